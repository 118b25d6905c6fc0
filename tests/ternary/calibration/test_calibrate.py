"""Block-by-block calibration: what it learns from, that it helps, and that it survives a kill."""

from __future__ import annotations

import dataclasses
import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.scheduler import make_schedule
from flux_jax.tree import split_flat
from ternary.calibration.calibrator import Listener
from ternary.calibration.plan import make_plan
from ternary.calibration.progress import PartReport, Progress
from ternary.calibration.run import choose_prompts
from ternary.calibration.states import Samples, choose_states, trajectories
from ternary.calibration.streaming import HostWeights, parts_of
from ternary.config import QuantConfig
from ternary.distillation.step import PromptSet
from ternary.policy import Policy
from ternary.storage.tensor_file import TensorFile
from ternary.student import make_student
from tests.ternary.calibration.calibration_parts import (
    CONFIG,
    FLUX,
    GRID,
    QUANT,
    WORDS,
    cached_programs,
    held_out,
    make,
    make_prompts,
    make_teacher,
    make_weights,
    run_model,
)

pytestmark = pytest.mark.slow
_cached_programs = pytest.fixture(scope="module", autouse=True)(cached_programs)


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def prompts():
    return make_prompts()


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    calibrator = make(tmp_path_factory.mktemp("run") / "p")
    return calibrator, calibrator.run()


def student_of(teacher, calibrator, parts):
    """The whole student, of whose parts those named are calibrated."""
    student = make_student(teacher, QUANT, Policy())
    rebuild, flat = split_flat(student)
    for part in calibrator.weights.parts:
        if part.name in parts:
            trained = calibrator.progress.read(part)
            flat |= {part.prefix + name: jnp.asarray(value) for name, value in trained.items()}
    return rebuild(flat)


def relative(ours, theirs):
    axes = tuple(range(1, ours.ndim))
    return np.mean(np.sum((ours - theirs) ** 2, axes) / np.sum(theirs**2, axes))


def block_error(ours, theirs):
    """Both streams of a block's joined output."""
    return np.mean(
        [relative(ours[:, :WORDS], theirs[:, :WORDS]), relative(ours[:, WORDS:], theirs[:, WORDS:])]
    )


def test_states_lie_on_the_teachers_trajectories(teacher, prompts, calibrated):
    """Each is on the way from noise at the noise level that it says; the levels are spread."""
    calibrator, _ = calibrated
    samples = calibrator.progress.read_samples()
    assert samples.x.shape == (CONFIG.samples, GRID[0] * GRID[1], FLUX.in_channels)
    sigmas = np.unique(samples.sigma)
    assert len(sigmas) > CONFIG.states_each
    assert ((samples.guidance >= 1) & (samples.guidance <= 5)).all()
    assert set(samples.prompt) == set(range(5))
    # The later of two neighbouring states of one trajectory, from the earlier one.
    schedule = make_schedule(SchedulerConfig(), CONFIG.sampling_steps, 6).sigmas
    steps = np.searchsorted(-schedule, -samples.sigma)
    pairs = [
        i
        for i in range(len(steps) - 1)
        if steps[i + 1] == steps[i] + 1 and samples.guidance[i] == samples.guidance[i + 1]
    ]
    assert pairs
    velocity, _ = run_model(teacher, samples, prompts)
    for i in pairs:
        change = (samples.sigma[i + 1] - samples.sigma[i]) * velocity[i]
        np.testing.assert_allclose(samples.x[i] + change, samples.x[i + 1], rtol=1e-3, atol=1e-4)


def test_it_lowers_the_error_at_states_it_has_not_seen(teacher, prompts, calibrated):
    calibrator, _ = calibrated
    samples = held_out(calibrator)
    wanted, wanted_blocks = run_model(teacher, samples, prompts)
    names = calibrator.plan.trained
    rounded, rounded_blocks = run_model(student_of(teacher, calibrator, ()), samples, prompts)
    velocity, blocks = run_model(student_of(teacher, calibrator, names), samples, prompts)
    assert relative(velocity, wanted) < 0.7 * relative(rounded, wanted)
    for ours, plain, theirs in zip(blocks, rounded_blocks, wanted_blocks, strict=True):
        assert block_error(ours, theirs) < 0.8 * block_error(plain, theirs)


def test_a_block_sees_what_the_quantised_part_before_it_made(teacher, prompts, calibrated):
    """The errors it reports are those of a student whose earlier blocks are calibrated."""
    calibrator, reports = calibrated
    samples = calibrator.progress.read_samples()
    _, theirs = run_model(teacher, samples, prompts)
    names = ["double_blocks.0", "double_blocks.1", "single_blocks.0"]
    for index, name in enumerate(names):
        for done, reported in ((index, reports[name].before), (index + 1, reports[name].after)):
            _, ours = run_model(student_of(teacher, calibrator, names[:done]), samples, prompts)
            assert block_error(ours[index], theirs[index]) == pytest.approx(reported, rel=1e-3)
    # Fed by the teacher, the second block's error would be another one.
    student = make_student(teacher, QUANT, Policy(include=("double_blocks.1.*",)))
    _, fed = run_model(student, samples, prompts)
    alone = block_error(fed[1], theirs[1])
    assert alone != pytest.approx(reports["double_blocks.1"].before, rel=0.05)


def test_after_the_last_block_only_the_image_counts(teacher, prompts, calibrated):
    calibrator, reports = calibrated
    samples = calibrator.progress.read_samples()
    _, theirs = run_model(teacher, samples, prompts)
    names = calibrator.plan.trained
    _, ours = run_model(student_of(teacher, calibrator, names), samples, prompts)
    error = relative(ours[-1][:, WORDS:], theirs[-1][:, WORDS:])
    assert reports["single_blocks.1"].after == pytest.approx(error, rel=1e-3)


def test_one_program_trains_all_blocks_of_a_kind(calibrated):
    cache = calibrated[0].programs._cache
    steps = {kind: program for (what, kind, _), program in cache.items() if what == "_step"}
    assert {kind: program._cache_size() for kind, program in steps.items()} == {
        "double": 1,
        "single": 1,
    }


def test_embedders_and_the_final_layer_can_be_ternary(tmp_path, weights, prompts):
    """All of them trained: the conditioning vector too comes from the quantised part."""
    policy = Policy(include=("time_in.*", "final_layer.linear"))
    quant = QuantConfig(granularity="tensor", learned_scale=True, rank=2, activation_bits=8)
    calibrator = make(tmp_path / "p", weights, prompts, quant=quant, policy=policy)
    reports = calibrator.run()
    assert list(reports) == ["embedders", "final_layer"]
    assert all(report.after < 0.8 * report.before for report in reports.values())
    part, layers = weights.parts[0], calibrator.plan.layers["embedders"]
    start = calibrator.programs.start(jax.device_put(weights.part(part)), layers)
    trained = calibrator.progress.read(weights.parts[0])
    for kind in ("weight", "bias", "log_scale", "low_rank_a", "low_rank_b"):
        name = f"time_in.in_layer.{kind}"
        assert np.abs(trained[name] - np.asarray(start[name])).max() > 0, name


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, weights, prompts, monkeypatch):
    calibrator, taken = make(tmp_path / "p", weights, prompts), []
    real = calibrator.programs.step

    def step(*arguments):
        taken.append(arguments[0].name)
        state, loss = real(*arguments)
        return state, loss * jnp.float32(np.inf if taken.count("double_blocks.1") == 4 else 1)

    monkeypatch.setattr(calibrator.programs, "step", step)
    message = r"calibration of double_blocks.1 stopped: the loss is inf at step 3; lower the"
    with pytest.raises(UserError, match=message):
        calibrator.run()
    assert calibrator.progress.finished() == {"double_blocks.0"}


class Stop(Listener):
    def __init__(self, part, step):
        self.at = part, step

    def on_step(self, part, step, loss):
        if (part.name, step) == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, weights, prompts, calibrated):
    """Stopped in the middle of the third block, and opened again by a fresh object."""
    whole, _ = calibrated
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "p", weights, prompts).run(Stop("single_blocks.0", 5))
    again = make(tmp_path / "p", weights, prompts)
    assert again.progress.finished() == {"double_blocks.0", "double_blocks.1"}
    again.run()
    for part in weights.parts[1:-1]:
        one, other = whole.progress.read(part), again.progress.read(part)
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=f"{part.name} {name}")


def test_a_teacher_that_is_not_finite_is_refused(tmp_path, weights, prompts):
    broken = {
        part.prefix + name: value * np.float32(np.nan if name == "img_in.weight" else 1)
        for part in weights.parts
        for name, value in weights.part(part).items()
    }
    message = "velocity is not finite at step 0 of 6 of its trajectories; its weights are damaged"
    with pytest.raises(UserError, match=f"{message}$"):
        make(tmp_path / "p", HostWeights(FLUX, broken), prompts).run()
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    with pytest.raises(UserError, match=f"{message}, or it needs --compute-dtype float32$"):
        make(tmp_path / "q", HostWeights(FLUX, broken), prompts, config=config).run()


def test_another_runs_folder_is_refused(tmp_path, weights, prompts):
    progress = make(tmp_path / "p", weights, prompts).progress
    other = dataclasses.replace(CONFIG, steps=41)
    # As long as nothing is there, nothing is in the way.
    make(tmp_path / "p", weights, prompts, config=other)
    progress = make(tmp_path / "p", weights, prompts).progress
    shape = (1, 6, FLUX.in_channels)
    one = np.ones(1, np.float32)
    progress.write_samples(Samples(np.zeros(shape, np.float32), one, one, np.zeros(1, np.int32)))
    with pytest.raises(UserError, match="belongs to another calibration, with steps 40 where"):
        make(tmp_path / "p", weights, prompts, config=other)


@pytest.mark.parametrize(
    ("txt", "pooled", "message"),
    [
        ((5, 3, 8), (5, 12), r"widths 8 and 12 \(pooled\), expected 16 and 12"),
        ((5, 3, 16), (4, 12), "5 embeddings and 4 pooled ones"),
        ((0, 3, 16), (0, 12), "at least one"),
    ],
)
def test_prompts_of_another_model_are_refused(tmp_path, weights, txt, pooled, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "p", weights, PromptSet(jnp.zeros(txt), jnp.zeros(pooled)))


def test_a_rank_beyond_a_weight_is_refused_before_anything_is_drawn(tmp_path, weights, prompts):
    message = r"rank must be at most 32 beside a weight \(\d+, 32\), got 33"
    with pytest.raises(UserError, match=message):
        make(tmp_path / "p", weights, prompts, quant=QuantConfig(rank=33))


def test_the_plan(weights):
    def trained(blocks, policy=None):
        config = dataclasses.replace(CONFIG, blocks=blocks)
        return make_plan(FLUX, weights.shapes(), policy or Policy(), config).trained

    everything = trained(None)
    assert everything == tuple(part.name for part in parts_of(FLUX)[1:-1])
    assert trained(2) == everything[:2]
    assert trained(("single_blocks.0", "double_blocks.1")) == everything[1:3]
    assert trained(None, Policy(include=("single_blocks.*", "img_in"))) == (
        "embedders",
        *everything[2:],
    )
    # Of blocks that are counted, embedders are none.
    assert trained(1, Policy(include=("double_blocks.*", "img_in"))) == everything[:1]
    count = len(everything)
    assert trained(count) == everything
    with pytest.raises(UserError, match=f"blocks must be at most {count}, .*, got {count + 1}"):
        trained(count + 1)
    with pytest.raises(UserError, match="blocks: 'single_blocks.7' is no part with ternary"):
        trained(("single_blocks.7",))


def test_no_more_prompts_than_trajectories_are_encoded():
    prompts = [str(i) for i in range(50)]
    chosen = choose_prompts(prompts, CONFIG)
    assert len(chosen) == trajectories(CONFIG) == 8
    assert chosen == sorted(set(chosen), key=int)
    assert chosen != prompts[:8]
    assert choose_prompts(prompts[:3], CONFIG) == prompts[:3]


@pytest.mark.parametrize(
    ("samples", "each", "steps"), [(256, 4, 20), (2000, 3, 20), (997, 3, 7), (22, 3, 6), (5, 8, 8)]
)
def test_all_noise_levels_alike(samples, each, steps):
    config = dataclasses.replace(CONFIG, samples=samples, states_each=each, sampling_steps=steps)
    counts = np.zeros(steps, int)
    seeds = range(40)
    for seed in seeds:
        origin, at = choose_states(config, np.random.default_rng(seed))
        assert len(set(zip(origin.tolist(), at.tolist(), strict=True))) == samples == len(at)
        assert np.bincount(origin).max() <= each
        assert origin.max() < trajectories(config)
        counts += np.bincount(at, minlength=steps)
    expected = len(seeds) * samples / steps
    # Five standard deviations of independent draws; these are further apart from each other.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_states_are_spread_over_their_trajectory():
    config = dataclasses.replace(CONFIG, samples=400, states_each=4, sampling_steps=20)
    _, at = choose_states(config, np.random.default_rng(0))
    np.testing.assert_array_equal(at.reshape(100, 4) // 5, np.tile(np.arange(4), (100, 1)))


@pytest.mark.parametrize("what", ["a part", "the states"])
def test_a_file_that_cannot_be_written_is_not_left(tmp_path, weights, prompts, monkeypatch, what):
    """From its first byte on it takes the room of the whole."""

    def full(self, name, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    progress = make(tmp_path / "p", weights, prompts).progress
    monkeypatch.setattr(TensorFile, "write", full)
    before = set((tmp_path / "p").iterdir())
    part, one = weights.parts[0], np.ones(1, np.float32)
    samples = Samples(np.zeros((1, 6, FLUX.in_channels), np.float32), one, one, one.astype(int))
    report = PartReport(before=1.0, after=0.5, seconds=1.0)
    write = {
        "a part": lambda: progress.write(part, weights.part(part), report),
        "the states": lambda: progress.write_samples(samples),
    }
    with pytest.raises(UserError, match="No space left on device; what is finished is kept there"):
        write[what]()
    assert set((tmp_path / "p").iterdir()) == before
    assert progress.finished() == set()


def test_samples_survive_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    samples = Samples(
        x=rng.standard_normal((4, 6, 8), np.float32),
        sigma=rng.random(4, np.float32),
        guidance=rng.random(4, np.float32),
        prompt=np.array([3, 0, 70000, 2], np.int32),
    )
    Progress(tmp_path / "p", {}).write_samples(samples)
    found = Progress(tmp_path / "p", {}).read_samples()
    for one, other in zip(found, samples, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
