"""What the documentation's site adds to docs/, as hooks of MkDocs.

- Pages that live elsewhere: README.md is the home page, the changelog, the shipped model's story.
- The notebooks, with their outputs.
- The reference: a page for each package, its public names in order.
- Equations as MathML, which browsers draw without a script.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

from pallas_kernels.command_line import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site, and the files that they are made from.
ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "examples/tiny_flux.md": "examples/tiny_flux/README.md",
}
# Linked to from pages above, and part of the site as they are.
FILES = ("LICENSE",)
_LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
_MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in docs/."""
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relinked(text, source, page)))
    for name in FILES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text("utf-8")))
    for package in PACKAGES:
        page = f"reference/{package}.md"
        files.append(File.generated(config, page, content=reference(package)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name, content in notebook_files(path):
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of docs/ to files outside it go to their pages."""
    source = page.file.src_uri
    if page.file.generated_by is not None:
        return markdown
    return relinked(markdown, f"docs/{source}", source)


def on_page_content(content: str, **_: Any) -> str:
    """LaTeX to MathML."""
    return _MATH.sub(lambda match: _mathml(match[2] or match[3], match[2] is None), content)


def relinked(text: str, source: str, page: str) -> str:
    """`text` of the file `source` with links as the site's `page` needs them.

    Args:
      text: markdown whose links are relative to `source`.
      source: path from the repository's root.
      page: path from the root of the site's pages.
    """
    pages = {there: here for here, there in ELSEWHERE.items()}

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if target in pages:
            found = pages[target]
        elif target.startswith("docs/"):
            found = target.removeprefix("docs/")
        elif target.endswith(".ipynb"):
            found = target.removesuffix(".ipynb") + ".md"
        else:
            found = target
        link = posixpath.relpath(found, posixpath.dirname(page) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    return _LINK.sub(replace, text)


def reference(package: str) -> str:
    """The page of a package: its text, then every public name."""
    lines = [f"# {package}", "", f"::: {package}", "    options:"]
    lines += ["      show_root_heading: false", "      show_root_toc_entry: false"]
    lines += ["      members: false", "      heading_level: 1", ""]
    for name, module in sorted(homes(package).items()):
        lines += [f"::: {package}.{module}.{name}", ""]
    return "\n".join(lines)


def homes(package: str) -> dict[str, str]:
    """The module of each public name, from the imports of the package's `__init__`."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    return {
        alias.name: node.module.removeprefix(f"{package}.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}.")
        for alias in node.names
        if node.module
    }


def notebook_files(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """A notebook as a page, and its pictures: (name, content)."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    pictures = 0
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # A formula that stands in a line is a block to the site only if it stands alone.
            text = re.sub(r"\$\$(.+?)\$\$", r"\n$$\n\1\n$$\n", text, flags=re.S)
            parts.append(relinked(text, f"notebooks/{path.name}", f"notebooks/{path.stem}.md"))
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            shown = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                name = f"{path.stem}_{pictures}.png"
                pictures += 1
                yield name, base64.b64decode(data["image/png"])
                parts.append(f"![output]({name})")
            elif shown and output.get("name") != "stderr":
                text = html.escape(shown.rstrip())
                parts.append(f'<div class="output"><pre><code>{text}</code></pre></div>')
    link = f"*The notebook: `notebooks/{path.name}`; run it with `make notebooks`.*"
    yield f"{path.stem}.md", "\n\n".join([parts[0], link, *parts[1:]])


def _mathml(latex: str, block: bool) -> str:
    latex = html.unescape(latex).strip()
    if block:
        # The box scrolls where the page is too narrow; the element itself would be cut off.
        return (
            f'<div class="equation">{latex2mathml.converter.convert(latex, display="block")}</div>'
        )
    return latex2mathml.converter.convert(latex, display="inline")
