"""One manner across the four command lines, and the page that lists them."""

from __future__ import annotations

import ast
import errno
import importlib
import importlib.metadata
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import defaultdict
from typing import Annotated

import jax
import pytest
import typer
from typer.testing import CliRunner

import ternary.cli
from pallas_kernels.command_line import PACKAGES, App
from pallas_kernels.errors import UserError
from tools import blocks, commands

FOUND = list(commands.commands())


def options(command: commands.Command) -> dict:
    """The options of a command by their long name."""
    return {p.opts[0]: p for p in command.parameters if p.param_type_name == "option"}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_command_line_is_light(package):
    """So that `--help` is there at once: commands import late what they work with."""
    program = f"import sys, {package}.cli; print([*sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"jax", "torch", "orbax", "transformers"} & set(ast.literal_eval(done.stdout))


def test_every_command_is_found():
    calls = {command.call.removeprefix("python -m ") for command in FOUND}
    assert {"convert", "flux_jax generate", "ternary distill", "pallas_kernels check"} <= calls
    assert len(calls) == len(FOUND)


@pytest.mark.parametrize("command", FOUND, ids=lambda command: command.call)
def test_every_command_has_the_common_options_and_examples(command):
    assert {"--quiet", "--verbose", "--json"} <= options(command).keys()
    assert command.examples
    assert command.summary.endswith(".")
    for parameter in command.parameters:
        assert parameter.help, f"{command.call} {parameter.opts}: no help"
        if parameter.param_type_name == "argument":
            assert parameter.metavar.isupper()


def test_a_name_is_spelled_one_way():
    """The same long name has the same short one; the same short name the same long one."""
    short, long = defaultdict(set), defaultdict(set)
    for command in FOUND:
        for name, option in options(command).items():
            rest = tuple(text for text in option.opts[1:] if not text.startswith("--"))
            short[name].add(rest)
            for text in rest:
                long[text].add(name)
    assert {name: found for name, found in short.items() if len(found) > 1} == {}
    assert {text: found for text, found in long.items() if len(found) > 1} == {}
    assert {"-o": {"--out"}, "-q": {"--quiet"}, "-v": {"--verbose"}}.items() <= long.items()


@pytest.mark.parametrize("name", ["--json", "--quiet", "--verbose", "--force"])
def test_a_common_option_has_one_help(name):
    assert len({options(each)[name].help for each in FOUND if name in options(each)}) == 1


def test_the_examples_use_options_that_exist():
    by_call = {command.call: command for command in FOUND}
    for command in FOUND:
        for example in command.examples:
            words = shlex.split(example[example.index("python -m") :])
            call = max((c for c in by_call if words[: len(c.split())] == c.split()), key=len)
            assert call == command.call, example
            known = {o for p in command.parameters for o in [*p.opts, *p.secondary_opts]}
            assert {word for word in words if word.startswith("--")} <= known, example


def test_the_page_is_current():
    before = commands.PAGE.read_text(encoding="utf-8")
    assert blocks.replaced(before, "commands", commands.render()) == before, (
        "docs/commands.md is out of date: run `make tables`"
    )


def test_groups_are_walked_and_hidden_commands_left_out():
    app, inner = App(name="outer"), App(name="inner")

    @app.command()
    def plain() -> None:
        """Plain."""

    @inner.command()
    def deep(limit: Annotated[int, typer.Option(help="How many.")] = 3) -> None:
        """Deep."""

    @inner.command(hidden=True)
    def old() -> None:
        """Old."""

    app.add_typer(inner, name="group")
    inner.callback()(lambda: None)
    found = {c.call: c for c in commands.below("python -m x", typer.main.get_command(app))}
    assert found.keys() == {"python -m x plain", "python -m x group deep"}
    assert {"--limit", "--quiet", "--verbose"} <= options(found["python -m x group deep"]).keys()


def test_a_page_without_the_block_is_refused():
    with pytest.raises(ValueError, match="0 blocks called commands, expected one"):
        blocks.replaced("no block", "commands", "")


def make_app() -> App:
    app = App(name="made")

    @app.command()
    def run(what: str, size: Annotated[int, typer.Option(min=1)] = 1) -> None:
        del size
        logging.getLogger("ternary").info("on the way")
        if what == "user":
            raise UserError("--size must be 1,\ngot 2")
        if what == "memory":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes\nmore")
        if what == "host memory":
            raise jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 9 bytes.")
        if what == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", "the/file")
        if what == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if what == "full file":
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "the/file")
        if what == "bug":
            raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "compile":
            jax.monitoring.record_event_duration_secs(
                "/jax/core/compile/backend_compile_duration", 12.34, fun_name="denoise"
            )
        typer.echo("the result")

    return app


@pytest.mark.parametrize(
    ("what", "code", "error"),
    [
        ("nothing", 0, ""),
        ("user", 2, "error: --size must be 1, got 2\n"),
        (
            "memory",
            1,
            "error: the device's memory is full: RESOURCE_EXHAUSTED: Out of memory: 9 bytes "
            "(docs/troubleshooting.md)\n",
        ),
        (
            "host memory",
            1,
            "error: the device's memory is full: INTERNAL: Out of memory allocating 9 bytes. "
            "(docs/troubleshooting.md)\n",
        ),
        ("locked", 2, "error: the/file: cannot be opened: Permission denied\n"),
        (
            "full",
            2,
            "error: a file, or what is printed: cannot be written: No space left on device\n",
        ),
        ("full file", 2, "error: the/file: cannot be written: Disk quota exceeded\n"),
        ("interrupt", 130, ""),
        ("terminate", 143, ""),
    ],
)
def test_exit_codes(what, code, error):
    result = CliRunner().invoke(make_app(), [what, "--quiet"])
    assert result.exit_code == code
    assert result.stderr == error
    assert result.stdout == ("the result\n" if code == 0 else "")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT)])
def test_a_signal_is_not_lost_where_python_drops_exceptions(name, code):
    """In a callback of the garbage collector, as JAX has one."""
    program = f"""
import gc, os, signal, time
from pallas_kernels.errors import exit_on_user_error

def send(phase, info):
    gc.callbacks.remove(send)
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.1)

# A shell that runs the tests in its background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
with exit_on_user_error():
    gc.callbacks.append(send)
    gc.collect()
    time.sleep(30)
    print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("given", "found"),
    [(["--size", "0"], "0"), (["--size=-3"], "-3"), (["--size", "x"], "x")],
)
def test_a_wrong_value_is_one_line(given, found):
    result = CliRunner().invoke(make_app(), ["nothing", *given])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(rf"error: --size: .*, got {found}", line)


@pytest.mark.parametrize("given", [["--sise", "3"], []])
def test_a_misspelt_or_missing_option_is_told_with_the_usage(given):
    result = CliRunner().invoke(make_app(), given)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


def test_a_bug_keeps_its_traceback():
    result = CliRunner().invoke(make_app(), ["bug"])
    assert result.exit_code == 1
    assert "no such thing" in str(result.exception)


def test_messages_are_on_stderr_as_loud_as_is_asked():
    loud = CliRunner().invoke(make_app(), ["compile", "--verbose"])
    assert loud.stdout == "the result\n"
    first, *rest = loud.stderr.splitlines()
    assert re.match(r"DEBUG: Python \d+\.\d+\.\d+, .*jax \d", first)
    assert rest == ["INFO: on the way", "DEBUG: compiled denoise in 12.3 s"]
    plain = CliRunner().invoke(make_app(), ["compile"])
    assert plain.stderr == "INFO: on the way\n"
    both = CliRunner().invoke(make_app(), ["nothing", "--quiet", "--verbose"])
    assert both.exit_code == 2
    assert both.stderr == "error: give --quiet or --verbose, not both\n"


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_that_was_closed_takes_what_is_written(tmp_path, number):
    program = f"""
import os, pathlib, sys
import typer
from tqdm import tqdm
from pallas_kernels.command_line import App

app = App()

@app.command()
def main(out: pathlib.Path) -> None:
    for _ in tqdm(range(1)):
        print("printed")
    # As a library in C writes.
    with out.open("wb") as file:
        os.write({number}, b"lost")
        file.write(b"kept")

app()
"""
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(program)
    command = f'exec "$0" "$1" "$2" {number}>&-'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(script), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == b"kept"
    assert done.stdout == ("" if number == 1 else "printed\n")


def test_verbose_shows_the_traceback():
    result = CliRunner().invoke(make_app(), ["user", "-v"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: --size must be 1, got 2"


@pytest.mark.parametrize("package", PACKAGES)
def test_version(package):
    """Told alone, whatever else a command line would ask for."""
    result = CliRunner().invoke(importlib.import_module(f"{package}.cli").app, ["--version"])
    assert result.exit_code == 0
    installed = importlib.metadata.version("flux-jax")
    assert result.stdout == f"flux-jax {installed}\n"


def test_version_where_nothing_is_installed(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    result = CliRunner().invoke(ternary.cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "flux-jax, not installed\n")


@pytest.mark.parametrize(
    ("script", "module", "words", "expected"),
    [
        ("flux-jax", "flux_jax.cli", "flux-jax gen", "generate"),
        ("flux-ternary", "ternary.cli", "flux-ternary distill --te", "--teacher"),
        ("flux-convert", "convert.cli", "flux-convert --verif", "--verify"),
        ("flux-kernels", "pallas_kernels.cli", "flux-kernels ch", "check"),
    ],
)
def test_shells_complete_the_scripts(script, module, words, expected):
    """What bash asks of a script whose completion is installed, and what it is answered."""
    program = f"import sys; sys.argv = ['{script}']; from {module} import app; app()"
    asked = {
        f"_{script.replace('-', '_').upper()}_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in done.stdout.split(), done.stderr


@pytest.mark.parametrize(("option", "shown"), [("--quiet", False), ("--verbose", True)])
def test_tracebacks_of_libraries_are_for_the_verbose(option, shown):
    """Such as of a thread of Orbax's, when another process was killed."""
    app = App(name="made")

    @app.command()
    def run() -> None:
        try:
            raise TimeoutError("the other process is gone")
        except TimeoutError:
            logging.getLogger("absl").error("could not save", exc_info=True)

    result = CliRunner().invoke(app, [option])
    assert "ERROR: could not save\n" in result.stderr
    assert ("Traceback" in result.stderr) == shown
