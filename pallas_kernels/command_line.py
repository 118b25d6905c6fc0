"""What all our command lines share: options, messages, exit codes (docs/commands.md).

Results go to stdout, progress and messages to stderr. The exit code is 0, or 1 where a check failed
or something broke, 2 for what the user can mend, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import inspect
import json as json_module
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from pallas_kernels.errors import BAD_INPUT, UserError, exit_on_user_error, show_error

PACKAGES = ("flux_jax", "convert", "ternary", "pallas_kernels")
# Programs that compile quicker than this are not worth a line, in seconds.
SLOW_COMPILATION = 0.1

logger = logging.getLogger(__name__)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no messages.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also versions, slow compilations and tracebacks."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what is there, once the new is whole.")
]


def _tell_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(", ".join(_versions("flux-jax")) or "flux-jax, not installed")
        raise typer.Exit
    return wanted


Version = Annotated[
    bool,
    typer.Option(
        "--version", is_eager=True, callback=_tell_version, help="Print the version, and end."
    ),
]


class _Command(typer.core.TyperCommand):
    """Tells of an option's wrong value in one line, as all that is wrong is told."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            parameter: Any = error.param
            # A missing one is of a class of its own, and shown with the usage.
            if type(error) is not typer.BadParameter or parameter is None:
                raise
            name, value = _found(parameter, given)
            message = error.message.rstrip(".")
            told = f"{name}: {message[:1].lower()}{message[1:]}"
            show_error(told if value is None else f"{told}, got {value}")
            raise typer.Exit(BAD_INPUT) from None


def _found(parameter: Any, given: list[str]) -> tuple[str, str | None]:
    """What an option or argument is called, and its value, if one alone is seen."""
    names = [name for name in parameter.opts if name.startswith("-")]
    if not names:
        return str(parameter.metavar or parameter.name).upper(), None
    values = []
    for number, word in enumerate(given):
        option, equals, behind = word.partition("=")
        if option in names and (equals or number + 1 < len(given)):
            values.append(behind if equals else given[number + 1])
    return names[0], values[0] if len(values) == 1 else None


class App(typer.Typer):
    """A command line of ours. Each command is registered with `--quiet` and `--verbose`.

    A command that has no use for `quiet` itself leaves it out of its signature.
    """

    def __init__(self, **settings: Any):
        super().__init__(rich_markup_mode=None, pretty_exceptions_enable=False, **settings)

    def command(self, *names: Any, **settings: Any) -> Callable[[Any], Any]:
        """As typer's."""
        register = super().command(*names, **{"cls": _Command, **settings})

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(with_common_options(function))
            return function

        return decorate


def before_commands(version: Version = False) -> None:
    """The callback of a command line of several commands: what stands before a command's name.

    A command line of one command has `Version` among its options.
    """
    del version


def with_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the options that every command has, run as every command is."""
    signature = inspect.signature(function, eval_str=True)
    own = dict(signature.parameters)
    common = {"quiet": Quiet, "verbose": Verbose}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in common.items()
        if name not in own
    ]

    @functools.wraps(function)
    def run(**values: Any) -> None:
        quiet, verbose = values["quiet"], values["verbose"]
        _replace_closed_streams()
        if quiet and verbose:
            show_error("give --quiet or --verbose, not both")
            raise typer.Exit(BAD_INPUT)
        with exit_on_user_error(verbose=verbose), _messages(quiet=quiet, verbose=verbose):
            function(**{name: value for name, value in values.items() if name in own})

    whole = signature.replace(parameters=[*own.values(), *added])
    # What typer reads in place of the wrapper's own.
    setattr(run, "__signature__", whole)  # noqa: B010
    run.__annotations__ = {name: each.annotation for name, each in whole.parameters.items()}
    return run


def _replace_closed_streams() -> None:
    """Lets go what is written to a stream that was closed before the start, as by `2>&-`.

    Python has None in its place, which progress bars do not take; and the next file that is opened
    would have the stream's number, and with it all that libraries print.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nothing = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
            setattr(sys, name, nothing)


def check_folder_of(option: str, path: Path, *, make: bool = False) -> None:
    """Refuses a file that could not be made, before the long work whose result it is to hold.

    Args:
      option: that names the file.
      path: of the file.
      make: its folder, where there is none.

    Raises:
      UserError: its folder does not exist, the path is a folder itself, or nothing can be written
        there.
    """
    folder = path.absolute().parent
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise UserError(f"{option} {path}: the folder {folder} does not exist")
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder, expected the name of a file")
        if path.exists() and not path.is_file():
            # A device or a pipe is written to in its place.
            return
        # As long a name as the file has while it is written.
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{option} {path}: cannot be written: {reason}") from error


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json_module.dumps(content, indent=2))


class _Brief(logging.Formatter):
    """Messages without tracebacks: libraries log theirs, from threads that no `except` reaches."""

    def format(self, record: logging.LogRecord) -> str:
        brief = copy.copy(record)
        brief.exc_info = brief.exc_text = brief.stack_info = None
        return super().format(brief)


@contextlib.contextmanager
def _messages(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Our loggers at the level that is asked for, on stderr."""
    # A handler for each command: where one process runs several, stderr may be another stream.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((logging.Formatter if verbose else _Brief)("%(levelname)s: %(message)s"))
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    ours = [logging.getLogger(name) for name in PACKAGES]
    before = [each.level for each in ours]
    root = logging.getLogger()
    root.addHandler(handler)
    for each in ours:
        each.setLevel(level)
    try:
        if verbose:
            _tell_versions()
        with _compilations_told() if verbose else contextlib.nullcontext():
            yield
    finally:
        root.removeHandler(handler)
        for each, old in zip(ours, before, strict=True):
            each.setLevel(old)


def _tell_versions() -> None:
    ours = _versions("flux-jax", "jax", "jaxlib", "flax")
    logger.debug("%s", ", ".join([f"Python {platform.python_version()}", *ours]))


def _versions(*packages: str) -> list[str]:
    """Name and version of those packages that are installed."""
    found = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


@contextlib.contextmanager
def _compilations_told() -> Iterator[None]:
    # Late: JAX takes a second.
    import jax

    def told(event: str, duration_secs: float, **details: str | int) -> None:
        if event.endswith("backend_compile_duration") and duration_secs > SLOW_COMPILATION:
            logger.debug(
                "compiled %s in %.1f s", details.get("fun_name", "a program"), duration_secs
            )

    jax.monitoring.register_event_duration_secs_listener(told)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(told)
