"""Writes docs/commands.md from the parsers.

    python -m tools.commands          # rewrite
    python -m tools.commands --check  # exit code 1 if it is out of date

The text above the mark is written by hand; what stands between the marks is not.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import typer

from pallas_kernels.command_line import PACKAGES
from tools import blocks

PAGE = blocks.ROOT / "docs" / "commands.md"
COMPLETION = {"install_completion", "show_completion"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command, as its parser describes it.

    Attributes:
      call: how it is called, such as `python -m flux_jax generate`.
      text: its help, the examples cut off.
      examples: each one command, without indentation.
      parameters: the parser's, arguments before options.
    """

    call: str
    text: str
    examples: tuple[str, ...]
    parameters: tuple[Any, ...]

    @property
    def summary(self) -> str:
        """The first sentence."""
        return re.split(r"(?<=\.)\s", self.text, maxsplit=1)[0]

    @property
    def title(self) -> str:
        """Of its section in the page."""
        return self.call.removeprefix("python -m ")

    @property
    def anchor(self) -> str:
        """The section's, here and on GitHub."""
        return self.title.replace(" ", "-")


def commands() -> Iterator[Command]:
    """Every command of ours that is not hidden."""
    for package in PACKAGES:
        app = importlib.import_module(f"{package}.cli").app
        yield from below(f"python -m {package}", typer.main.get_command(app))


def below(call: str, parser: Any) -> Iterator[Command]:
    """The commands of a parser: itself, or those of a group and of the groups in it."""
    inner = getattr(parser, "commands", None)
    if inner is None:
        yield _command(call, parser)
        return
    for name, command in inner.items():
        if not command.hidden:
            yield from below(f"{call} {name}", command)


def _command(call: str, command: Any) -> Command:
    help_text = textwrap.dedent(command.help or "")
    text, _, examples = help_text.partition("\b\nExamples:\n")
    shown = [p for p in command.params if p.name not in COMPLETION and not _hidden(p)]
    shown.sort(key=lambda parameter: parameter.param_type_name != "argument")
    joined = textwrap.dedent(examples).replace("\\\n", "")
    lines = [re.sub(r"\s{2,}", " ", line).strip() for line in joined.splitlines()]
    return Command(
        call=call,
        text=text.strip(),
        examples=tuple(line for line in lines if line),
        parameters=tuple(shown),
    )


def _hidden(parameter: Any) -> bool:
    return bool(getattr(parameter, "hidden", False))


def render() -> str:
    """The table of all commands, then a section for each."""
    found = list(commands())
    lines = ["| command | does |", "| --- | --- |"]
    for each in found:
        lines.append(f"| [`{each.call}`](#{each.anchor}) | {each.summary} |")
    for each in found:
        lines += ["", *_section(each)]
    return "\n".join(lines)


def _section(command: Command) -> list[str]:
    arguments = [p for p in command.parameters if p.param_type_name == "argument"]
    usage = " ".join([command.call, *map(_usage, arguments), "[OPTIONS]"])
    lines = [f"## {command.title}", ""]
    lines += ["```", usage, "```", "", command.text, ""]
    if command.examples:
        lines += ["```bash", *command.examples, "```", ""]
    lines += ["| argument or option | what | default |", "| --- | --- | --- |"]
    for parameter in command.parameters:
        lines.append(f"| {_names(parameter)} | {_cell(parameter.help)} | {_default(parameter)} |")
    return lines


def _usage(argument: Any) -> str:
    metavar = argument.metavar
    metavar += "..." if argument.nargs == -1 else ""
    return metavar if argument.required else f"[{metavar}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def _default(parameter: Any) -> str:
    """As `--help` shows it: the words given for it, else the value; a flag's is off."""
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return _cell(parameter.show_default)
    if not parameter.show_default or parameter.default is None:
        return ""
    if isinstance(parameter.default, bool):
        return "on" if parameter.default else ""
    if isinstance(parameter.default, tuple | list):
        return " ".join(f"`{value}`" for value in parameter.default)
    return f"`{parameter.default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    typer.run(blocks.writer(PAGE, "commands", render, "python -m tools.commands"))
