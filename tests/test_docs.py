"""The documentation: generated pages are current, quoted messages exist, the site builds."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from pallas_kernels.command_line import PACKAGES
from tools import commands, settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
PROSE = [ROOT / "README.md", *PAGES, ROOT / "examples" / "tiny_flux" / "README.md"]
# What is run with `python -m` and is no command line of a package.
SCRIPTS = ("benchmarks", "examples", "tools")
GAP = "\0"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A tool in a process of its own: without the shape checks that tests add to the code."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_public_names_are_current():
    done = run_tool("tools.public_api", "--check")
    assert done.returncode == 0, done.stderr


def test_the_settings_are_current():
    done = run_tool("tools.settings", "--check")
    assert done.returncode == 0, done.stderr


def test_what_a_setting_is_comes_from_its_docstring():
    @dataclasses.dataclass
    class Config:
        """Of a test.

        Attributes:
          one: the first, which
            goes on.
          two, three: both | more.

        Raises:
          Nothing.
        """

    both = "both \\| more."
    told = {"one": "the first, which goes on.", "two": both, "three": both}
    assert settings.attributes(Config) == told


@pytest.mark.parametrize("package", PACKAGES)
def test_a_public_name_is_imported_for_type_checkers(package):
    """What `__init__` loads late is what its TYPE_CHECKING block names, and the reference lists."""
    module = importlib.import_module(package)
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    named = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}.")
        for alias in node.names
    }
    assert sorted(named) == sorted(module.__all__)
    for name, home in named.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


def strings(node: ast.AST) -> list[str]:
    """Every text of a module, with a gap in place of each value put into it."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else GAP for p in child.values]
            found.append("".join(map(str, parts)))
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            found.append(child.value)
    return found


def quoted_messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [block.strip() for block in re.findall(r"```error\n(.*?)```", text, re.S)]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    return [text for path in files for text in strings(ast.parse(path.read_text("utf-8")))]


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_one_of_ours(message, sources):
    """The pieces between dots stand in one text of the code, in order."""
    pattern = re.compile(".*?".join(map(re.escape, message.split("..."))), re.S)
    assert any(pattern.search(text) for text in sources), message


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Knows no tags; mkdocs.yml has none that matter here."""

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    listed = set(re.findall(r"[\w/]+\.md", json.dumps(nav)))
    assert {path.name for path in PAGES} <= listed
    notebooks = {f"notebooks/{p.stem}.md" for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= listed


BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.S | re.M)


def shell_commands(modules: tuple[str, ...] = PACKAGES) -> list[tuple[str, str]]:
    """(page, command) of every `python -m` command of ours on a page, in a block or in a line."""
    found = set()
    for path in PROSE:
        text = path.read_text(encoding="utf-8")
        blocks = [block for language, block in BLOCK.findall(text) if language in ("", "bash")]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", BLOCK.sub("", text))
        for line in lines:
            match = re.search(rf"python -m ((?:{'|'.join(modules)})\b.*)", line)
            if match:
                found.add((path.name, match[1].strip()))
    return sorted(found)


KNOWN = {command.call.removeprefix("python -m "): command for command in commands.commands()}


@pytest.mark.parametrize(("page", "command"), shell_commands())
def test_a_command_of_a_page_exists(page, command):
    words = shlex.split(command, comments=True)
    if words[1:] == ["--version"]:
        # Of a package, not of its commands: tests/test_command_lines.py asks all four.
        return
    calls = [" ".join(words[:count]) for count in (3, 2, 1)]
    call = next((call for call in calls if call in KNOWN), None)
    # A group without the name of one of its commands takes the options of its default.
    meant = [KNOWN[call]] if call else [c for n, c in KNOWN.items() if n.startswith(calls[1] + " ")]
    assert meant, f"{page}: no command {calls[1]}"
    parameters = [parameter for each in meant for parameter in each.parameters]
    known = {option for p in parameters for option in [*p.opts, *p.secondary_opts]}
    used = {word for word in words if word.startswith("--")}
    assert used <= known | {"--help"}, f"{page}: {command} has no {sorted(used - known)}"


@pytest.mark.parametrize(("page", "command"), shell_commands(SCRIPTS))
def test_a_script_of_a_page_exists(page, command):
    name, *words = shlex.split(command, comments=True)
    module = importlib.import_module(name)
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    parser = typer.main.get_command(app)
    if hasattr(parser, "commands"):
        assert words, f"{page}: {command} wants one of {sorted(parser.commands)}"
        parser = parser.commands[words[0]]
    known = {option for p in parser.params for option in [*p.opts, *p.secondary_opts]}
    used = {word for word in words if word.startswith("--")}
    assert used <= known, f"{page}: {command} has no {sorted(used - known)}"


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_a_file_of_a_page_exists(page):
    """A path in code marks that begins with a folder of ours; `*` and `<...>` are anything."""
    folders = "|".join((*PACKAGES, *SCRIPTS, "docs", "notebooks", "requirements", "tests"))
    # Of another repository, whose folder is called like one of ours.
    foreign = {"examples/dataset"}
    for named in set(re.findall(rf"`((?:{folders})/[\w./*<>-]+)`", page.read_text("utf-8"))):
        assert named in foreign or list(ROOT.glob(re.sub(r"<\w+>", "*", named))), named


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_lines_of_prose_can_be_read(page):
    """Beside another window, and in a diff; what a program wrote and code stand as they are."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"<!-- (\w+).*?<!-- /\1", "", text, flags=re.S)
    long = [line for line in text.splitlines() if len(line) > 145 and not line.startswith("|")]
    assert not long


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="the extra `docs` is not installed"
)
def test_the_site_builds(tmp_path):
    """Strictly: a link or an anchor that leads nowhere is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    method = (tmp_path / "method.html").read_text(encoding="utf-8")
    assert method.count("<math") > 20
    assert "arithmatex" not in method
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="quickstart.html"' in home
    reference = (tmp_path / "reference" / "ternary.html").read_text(encoding="utf-8")
    assert 'id="ternary.config.QuantConfig"' in reference
    # Everything a page needs comes with it.
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'(?:<script[^>]*src|<link[^>]*href)="(https?:[^"]+)', page.read_text()
        )
        assert not fetched, (page.name, fetched)


def test_the_settings_of_a_page_are_settings():
    """What `distill` is told by `--set` on a page is read without complaint."""
    from ternary import RunConfig
    from ternary.distillation.run_config import read_run_config

    seen = 0
    for _, command in shell_commands():
        changes = re.findall(r"--set (\S+=\S+)", command)
        if changes:
            assert isinstance(read_run_config(None, changes), RunConfig)
            seen += 1
    assert seen >= 3
