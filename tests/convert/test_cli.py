"""`python -m convert`, as users run it: exit codes, one line on stderr, nothing left behind."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from convert import atomic, engine, files, targets
from convert.cli import app
from flux_jax.assets import shipped_path
from tests.convert.models import CONFIGS, diffusers_folder, safetensors_in, write_tensors

TEXT = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "m"
    diffusers_folder(path, TEXT, shard_bytes=4_000)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder, to be broken."""
    shutil.copytree(folder, tmp_path / "in" / "m")
    return tmp_path / "in" / "m"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "flax"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def assert_refused(result, out, *texts):
    """Exit code 2, one line on stderr that says `texts`, and nothing beside the target."""
    assert result.exit_code == 2, result.output
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for text in texts:
        assert text in error
    assert "Traceback" not in result.output
    assert list(out.parent.iterdir()) == []


def command(*arguments):
    return [sys.executable, "-m", "convert", *map(str, arguments)]


def test_help_reads_well():
    result = run("--help")
    assert result.exit_code == 0
    for text in ("--components", "--dtype", "--to", "--verify", "--force", "--revision", "keep"):
        assert text in result.output


def test_the_command_converts_and_says_what(folder, out):
    done = subprocess.run(command(folder, out, "--verify"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: text_encoder, text_encoder_2, 0.00 GB, 57 tensors verified\n"
    assert "WARNING" not in done.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        *sorted(TEXT),
        "tokenizer",
        "tokenizer_2",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["flax"]


def test_quiet_says_nothing(folder, out):
    result = run(folder, out, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_json_is_all_that_is_on_stdout(folder, out):
    result = run(folder, out, "--verify", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["path"], told["verified"]) == (str(out), 57)
    assert told["components"] == ["text_encoder", "text_encoder_2"]


def test_that_codes_become_dense_weights_is_told(out):
    result = run("tiny-ternary", out, "--components", "transformer")
    assert result.exit_code == 0, result.output
    assert "transformer: packed codes became dense weights" in result.stderr
    assert "became dense" not in run("tiny", out, "--force", "--components", "vae").stderr


def test_an_existing_target_needs_force(folder, out):
    assert run(folder, out, "--quiet").exit_code == 0
    before = (out / "config.json").stat().st_ino
    result = run(folder, out, "--quiet")
    assert result.exit_code == 2
    assert "exists already; --force replaces it" in result.stderr
    assert (out / "config.json").stat().st_ino == before
    assert run(folder, out, "--quiet", "--force").exit_code == 0
    assert (out / "config.json").stat().st_ino != before
    assert [p.name for p in out.parent.iterdir()] == ["flax"]


def test_force_does_not_replace_a_folder_of_another_kind(folder, out):
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    result = run(folder, out, "--force")
    assert result.exit_code == 2
    assert "no checkpoint that --force would replace" in result.stderr
    assert (out / "thesis.tex").exists()


def test_force_does_not_replace_what_else_is_in_the_folder(folder, out):
    assert run(folder, out, "--quiet").exit_code == 0
    (out / "thesis.tex").write_text("x")
    result = run(folder, out, "--force")
    assert result.exit_code == 2
    assert "no checkpoint that --force would replace" in result.stderr
    assert (out / "thesis.tex").exists()


@pytest.mark.parametrize("to", ["flax", "diffusers"])
@pytest.mark.parametrize(
    "place",
    [
        "text_encoder/my_notes.txt",
        "text_encoder/my_model.safetensors",
        "text_encoder_2/backup/precious.bin",
        "text_encoder/final_norm.bias/precious.bin",
        "tokenizer/my_notes.txt",
        "scheduler/my_notes.txt",
        "text_encoder_2/.hidden",
    ],
)
def test_force_does_not_replace_what_else_is_in_the_folders_inside(folder, out, to, place):
    assert run(folder, out, "--quiet", "--to", to).exit_code == 0
    assert engine.is_checkpoint(out)
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text("x")
    result = run(folder, out, "--force")
    assert result.exit_code == 2
    assert "no checkpoint that --force would replace, or has other files in it" in result.stderr
    assert (out / place).read_text() == "x"


@pytest.mark.parametrize("to", ["flax", "diffusers"])
def test_force_replaces_whole_pipelines(out, to):
    assert all(engine.is_checkpoint(shipped_path(name)) for name in ("tiny", "tiny-ternary"))
    for _ in range(2):
        assert run("tiny", out, "--quiet", "--force", "--to", to, "--shard-mb", 1).exit_code == 0


@pytest.mark.parametrize(
    ("content", "more", "replaced"),
    [
        ({"format": "flux_ternary_latents"}, "embedders.safetensors", True),
        ({"format": "flux_ternary_latents"}, "thesis.tex", False),
        ({"format": "another"}, "embedders.safetensors", False),
        (None, "embedders.safetensors", False),
    ],
)
def test_force_replaces_latent_weights_of_ours(folder, out, content, more, replaced):
    assert run(folder, out, "--quiet").exit_code == 0
    (out / "latents").mkdir()
    (out / "latents" / more).write_text("")
    if content is not None:
        (out / "latents" / "latents.json").write_text(json.dumps(content))
    result = run(folder, out, "--quiet", "--force")
    assert result.exit_code == (0 if replaced else 2), result.stderr
    assert (out / "latents").exists() != replaced


def test_force_does_not_replace_a_file_of_another_kind(folder, tmp_path):
    file = tmp_path / "precious.safetensors"
    file.write_text("not flux at all")
    arguments = (folder, file, "--to", "bfl", "--components", "vae", "--force")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "no checkpoint that --force would replace" in result.stderr
    assert file.read_text() == "not flux at all"


def test_force_does_not_replace_what_is_no_file(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = run(folder, tmp_path / "pipe", "--to", "bfl", "--components", "vae", "--force")
    assert result.exit_code == 2
    assert "no checkpoint that --force would replace" in result.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_what_was_read_only_is_replaced_and_removed(copy, out):
    """A tokenizer's folder, as from a disk that one may only read."""
    (copy / "tokenizer").chmod(0o555)
    try:
        for _ in range(3):
            assert run(copy, out, "--quiet", "--force").exit_code == 0
            assert (out / "tokenizer").stat().st_mode & 0o700 == 0o700
            assert [path.name for path in out.parent.iterdir()] == [out.name]
    finally:
        (copy / "tokenizer").chmod(0o755)


def test_all_is_on_the_disk_before_it_has_its_name(folder, out, monkeypatch):
    """Configs and tokenizers too: after a power cut a name stands for the whole."""
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
    assert run(folder, out, "--quiet").exit_code == 0
    missing = [path for path in [out, *out.rglob("*")] if path.stat().st_ino not in synced]
    assert missing == []


def test_a_truncated_shard(copy, out):
    shard = safetensors_in(copy / "text_encoder")[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(run(copy, out), out, str(shard), "download it again")


def test_a_forged_header(copy, out):
    shard = safetensors_in(copy / "text_encoder")[0]
    data = shard.read_bytes()
    shard.write_bytes(b"\xff" * 8 + data[8:])
    assert_refused(run(copy, out), out, str(shard), "header would be 18446744073709551615 bytes")


def test_a_missing_shard(copy, out):
    safetensors_in(copy / "text_encoder")[1].unlink()
    assert_refused(
        run(copy, out), out, "model.safetensors.index.json", "shards missing: model-00002"
    )


def test_an_index_that_leads_outside(copy, out):
    index = copy / "text_encoder" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../../secret.safetensors"
    index.write_text(json.dumps(content))
    assert_refused(run(copy, out), out, str(index), "lies outside the folder")


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [("StableDiffusion3Pipeline", "Stable Diffusion 3"), ("Flux2Pipeline", "FLUX.2")],
)
def test_a_wrong_architecture(copy, out, pipeline, said):
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": pipeline}))
    assert_refused(run(copy, out), out, said)


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt"])
def test_a_pickle(tmp_path, out, suffix):
    (tmp_path / f"flux.{suffix}").write_bytes(b"\x80\x04.")
    result = run(tmp_path / f"flux.{suffix}", out)
    assert_refused(result, out, "a pickle can run any code", ".safetensors")


def test_a_missing_tensor_and_a_stray_one(copy, out):
    write_tensors(copy / "text_encoder_2" / "model.safetensors", {"x": np.zeros(2, np.float32)})
    for file in copy.glob("text_encoder_2/*-of-*"):
        file.unlink()
    (copy / "text_encoder_2" / "model.safetensors.index.json").unlink()
    assert_refused(run(copy, out), out, "22 problems", "is missing")


def test_a_tokenizer_that_is_not_whole(copy, out):
    """In the hub's cache, files are links: to nothing, where a download was cut short."""
    (copy / "tokenizer" / "vocab.json").symlink_to(copy / "gone")
    assert_refused(run(copy, out), out, "vocab.json: cannot be copied: ", "No such file")


def test_a_tokenizer_that_may_not_be_read(copy, out, monkeypatch):
    """It is not copied as an empty folder."""
    listed = Path.iterdir

    def refused(path):
        if path == copy / "tokenizer":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert_refused(run(copy, out), out, "tokenizer: cannot be copied: Permission denied")


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "elsewhere" / "secret.txt"
    path.parent.mkdir()
    path.write_text("private")
    return path


@pytest.mark.parametrize("to", ["flax", "diffusers"])
def test_no_link_out_of_a_tokenizer_is_followed(copy, out, secret, to):
    """A stranger's checkpoint could have private files of this machine copied."""
    (copy / "tokenizer" / "notes.txt").symlink_to(secret)
    told = ("tokenizer/notes.txt: a link leads out of its folder, which is not followed",)
    assert_refused(run(copy, out, "--to", to), out, *told)
    shutil.rmtree(copy / "tokenizer")
    (copy / "tokenizer").symlink_to(secret.parent)
    told = ("tokenizer/secret.txt: a link leads out of its folder, which is not followed",)
    assert_refused(run(copy, out, "--to", to), out, *told)


def test_only_the_files_of_a_tokenizer_are_copied(copy, out, secret):
    (copy / "tokenizer" / "more").mkdir()
    (copy / "tokenizer" / "more" / "vocab.json").write_text("{}")
    (copy / "tokenizer" / "notes").symlink_to(secret)
    assert run(copy, out, "--quiet").exit_code == 0
    assert [path.name for path in (out / "tokenizer").iterdir()] == ["tokenizer_config.json"]


def test_links_into_the_blobs_of_the_hubs_cache_become_files(copy, out, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(copy, snapshot)
    (repository / "blobs").mkdir()
    file = snapshot / "tokenizer" / "tokenizer_config.json"
    content = file.read_bytes()
    file.rename(repository / "blobs" / "abc")
    file.symlink_to("../../../blobs/abc")
    assert run(snapshot, out, "--quiet").exit_code == 0
    made = out / "tokenizer" / file.name
    assert not made.is_symlink()
    assert made.read_bytes() == content


def test_an_absent_source(out):
    assert_refused(run("no/such/path", out), out, "no/such/path: no such file or folder")


def test_a_hub_id_without_network(out):
    """The tests run with HF_HUB_OFFLINE set."""
    assert_refused(run("nobody/nothing", out), out, "nobody/nothing: ", "cannot be reached")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--components", "unet", "unknown component unet; there are transformer, text_encoder"),
        ("--components", ",", "--components names none"),
        ("--dtype", "int4", "error: --dtype must be one of bf16, fp16, fp32, keep"),
        ("--to", "onnx", "error: --to must be one of flax, diffusers, bfl"),
    ],
)
def test_an_option_that_is_not_there(folder, out, option, value, said):
    assert_refused(run(folder, out, option, value), out, said)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(folder, out, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    monkeypatch.setattr(atomic, "staged", None)
    result = run(folder, out)
    assert_refused(result, out, "the checkpoint needs 0 MB, the disk has 0 MB free")


@pytest.mark.parametrize("to", ["flax", "diffusers", "bfl"])
def test_a_disk_that_fills_up_while_writing(folder, out, monkeypatch, to):
    """The write that fails is played: the third one of the checkpoint."""
    count = []
    write = os.write

    def full(fd, data):
        count.append(fd)
        if len(count) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(files.os, "write", full)
    assert_refused(run(folder, out, "--to", to), out, "disk full while writing (No space left")


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from convert.__main__ import app
app()
"""


@pytest.mark.parametrize("to", ["flax", "bfl"])
def test_a_limit_on_the_size_of_files_is_met(folder, tmp_path, out, to):
    """Not played: the system itself refuses to let a file grow."""
    big = {"text_encoder": dataclasses.replace(CONFIGS["text_encoder"], vocab_size=400)}
    diffusers_folder(tmp_path / "big", ["text_encoder"], configs=big)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "big"), str(out), "--to", to, "--quiet"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "disk full while writing (File too large); nothing was kept" in done.stderr
    assert list(out.parent.iterdir()) == []


def test_tensorstore_says_it_in_its_own_way(folder, out, monkeypatch):
    def full(*arguments):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [path=x]")

    monkeypatch.setattr(engine, "write_flax", full)
    assert_refused(run(folder, out), out, "disk full while writing (No space left on device)")


SLOW = """
import signal
import time
from convert import files
write = files.write_all
def slow(fd, data):
    time.sleep(0.05)
    return write(fd, data)
files.write_all = slow
# A shell gives its background jobs an ignored SIGINT, which is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
from convert.__main__ import app
app()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_half_checkpoint(folder, out, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder), str(out), "--to", "diffusers", "--quiet"],
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(out.parent.glob("flax.partial-*/flax/text_encoder/*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert not out.exists()
    left = [path.name for path in out.parent.iterdir()]
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    assert run(folder, out, "--to", "diffusers", "--quiet").exit_code == 0
    assert [path.name for path in out.parent.iterdir()] == ["flax"]


def test_an_unexpected_error_is_not_dressed_up(folder, out, monkeypatch):
    """A bug of ours shows as one, and still leaves nothing behind."""

    def broken(*arguments):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(targets, "copy_tokenizers", broken)
    result = run(folder, out, "--quiet")
    assert isinstance(result.exception, ZeroDivisionError)
    assert list(out.parent.iterdir()) == []
