"""The states at which blocks are calibrated: from trajectories of the teacher, streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from flux_jax.configs import SchedulerConfig
from flux_jax.errors import UserError
from flux_jax.rope import Rotation, image_ids, rotary_angles, text_ids
from flux_jax.scheduler import make_schedule
from flux_jax.tree import Flat
from ternary.calibration.block_training import PartPrograms
from ternary.calibration.streaming import (
    HostWeights,
    Part,
    Streams,
    pass_part,
    send,
    stream,
    stream_bytes,
    take_rows,
)
from ternary.config import CalibrateConfig
from ternary.distillation.step import PromptSet

# Streams of at most so many bytes stay on the device between the parts.
_DEVICE_BYTES = 2 << 30


class Samples(NamedTuple):
    """N states, on the host.

    Attributes:
      x: image tokens.
      sigma: noise levels.
      guidance: scales.
      prompt: rows of the prompt set.
    """

    x: Float[np.ndarray, "N I P"]
    sigma: Float[np.ndarray, " N"]
    guidance: Float[np.ndarray, " N"]
    prompt: Int[np.ndarray, " N"]


def on_host(prompts: PromptSet) -> PromptSet:
    """Encoded prompts as host arrays: there may be more of them than the device holds."""
    txt, pooled = (np.asarray(field) for field in prompts)
    fields: Any = (txt, pooled)
    return PromptSet(*fields)


def embedder_inputs(samples: Samples, prompts: PromptSet, rows: Int[np.ndarray, " B"]) -> Flat:
    """What the embedders take, for some samples."""
    prompt = samples.prompt[rows]
    return {
        "x": samples.x[rows],
        "sigma": samples.sigma[rows],
        "guidance": samples.guidance[rows],
        "txt": take_rows(np.asarray(prompts.txt), prompt),
        "pooled": take_rows(np.asarray(prompts.pooled), prompt),
    }


def positions(weights: HostWeights, grid: tuple[int, int], text_tokens: int) -> Rotation:
    """Angles of all positions, text first."""
    ids = np.concatenate([text_ids(text_tokens), image_ids(*grid)])
    return rotary_angles(jnp.asarray(ids), weights.config.axes_dim, weights.config.theta)


def teacher_velocity(
    weights: HostWeights,
    programs: PartPrograms,
    samples: Samples,
    prompts: PromptSet,
    batch_size: int,
    on_part: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, "N I P"]:
    """The teacher's velocity at every sample, each weight sent to the device once.

    Args:
      weights: the teacher.
      programs: for its parts.
      samples: where.
      prompts: that the samples name.
      batch_size: samples that pass a part together.
      on_part: called after each part.

    Returns:
      float32.
    """
    count, tokens, _ = samples.x.shape
    tokens += prompts.txt.shape[1]
    size = count * stream_bytes(weights.config, tokens, programs.dtype)
    streams = Streams(count, batch_size, on_device=size <= _DEVICE_BYTES)

    def use(part: Part, params: Flat) -> None:
        def inputs(number: int) -> Flat:
            if part.kind == "embed":
                return embedder_inputs(samples, prompts, streams.batches[number])
            return streams.batch(number)

        pass_part(streams, inputs, lambda batch: programs.forward(part, (), params, batch))
        on_part()

    stream(weights.parts, lambda part: send(weights.part(part)), use)
    return streams.array("velocity").astype(np.float32)


def trajectories(config: CalibrateConfig) -> int:
    """How many trajectories give the samples."""
    return -(-config.samples // config.states_each)


def choose_states(
    config: CalibrateConfig, random: np.random.Generator
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Which states are kept: each Euler step as likely as any other, none of them twice.

    A trajectory is cut into `states_each` stretches, of lengths that differ by a step at most, and
    gives a state of each, drawn at random. If that makes more states than are wanted, some are left
    out at random.

    Returns:
      (trajectory, step) of each sample, in that order.
    """
    steps, each = config.sampling_steps, config.states_each
    count = trajectories(config)
    borders = np.arange(each + 1) * steps // each
    within = random.integers(np.diff(borders), size=(count, each))
    # Stretches of unequal length begin anywhere, the last going on at the first step: else the
    # steps of a longer one would be rarer.
    first = random.integers(steps, size=(count, 1)) if steps % each else 0
    chosen = np.sort((first + borders[:-1] + within) % steps, axis=1)
    kept = np.sort(random.permutation(count * each)[: config.samples])
    return kept // each, chosen.reshape(-1)[kept]


def draw_samples(
    weights: HostWeights,
    programs: PartPrograms,
    scheduler: SchedulerConfig,
    prompts: PromptSet,
    grid: tuple[int, int],
    config: CalibrateConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """States of the teacher's own Euler trajectories, at the steps of `choose_states`.

    Prompts are used in a random order, none twice before all once.

    Args:
      weights: the teacher.
      programs: for its parts.
      scheduler: its noise schedule.
      prompts: encoded.
      grid: image tokens (rows, columns).
      config: how many, and the seed.
      on_progress: told the parts passed, and how many there are to pass.

    Raises:
      UserError: the teacher's velocity is not finite.
    """
    steps, count = config.sampling_steps, trajectories(config)
    random = np.random.default_rng([config.seed, 0])
    tokens = grid[0] * grid[1]
    sigmas = make_schedule(scheduler, steps, tokens).sigmas
    rounds = -(-count // len(prompts.txt))
    order = np.concatenate([random.permutation(len(prompts.txt)) for _ in range(rounds)])
    low, high = config.guidance
    guidance = random.uniform(low, high, count).astype(np.float32)
    origin, at = choose_states(config, random)
    shape = (count, tokens, weights.config.in_channels)
    x = random.standard_normal(shape, np.float32)
    prompt = order[:count].astype(np.int32)
    states = np.empty((config.samples, *shape[1:]), np.float32)
    # Trajectories are followed as far as the last state that is wanted.
    needed = int(at.max()) + 1
    total, done = (needed - 1) * len(weights.parts), 0

    def on_part() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    for step in range(needed):
        here = at == step
        states[here] = x[origin[here]]
        if step + 1 == needed:
            break
        now = Samples(x, np.full(count, sigmas[step]), guidance, prompt)
        velocity = teacher_velocity(weights, programs, now, prompts, config.batch_size, on_part)
        if not np.isfinite(velocity).all():
            remedy = ", or it needs --compute-dtype float32"
            raise UserError(
                f"the teacher's velocity is not finite at step {step} of {steps} of its "
                "trajectories; its weights are damaged"
                f"{'' if config.compute_dtype == 'float32' else remedy}"
            )
        x += (sigmas[step + 1] - sigmas[step]) * velocity
    return Samples(x=states, sigma=sigmas[at], guidance=guidance[origin], prompt=prompt[origin])
