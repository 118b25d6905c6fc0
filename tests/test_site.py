"""What the site's hooks make of the repository's files."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")

from tools import grouped_names, site  # noqa: E402


@pytest.mark.parametrize(
    ("source", "page", "before", "after"),
    [
        ("README.md", "index.md", "docs/convert.md#names", "convert.md#names"),
        ("README.md", "index.md", "examples/tiny_flux/README.md", "examples/tiny_flux.md"),
        ("docs/distillation.md", "distillation.md", "method.md", "method.md"),
        ("docs/distillation.md", "distillation.md", "../README.md", "index.md"),
        ("docs/quickstart.md", "quickstart.md", "../notebooks/2_a.ipynb", "notebooks/2_a.md"),
        (
            "examples/tiny_flux/README.md",
            "examples/tiny_flux.md",
            "../../docs/distillation.md",
            "../distillation.md",
        ),
        ("README.md", "index.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("README.md", "index.md", "#status", "#status"),
    ],
)
def test_links_follow_their_pages(source, page, before, after):
    assert site.relinked(f"see [this]({before}).", source, page) == f"see [this]({after})."


def test_equations_become_mathml():
    inline = r'<span class="arithmatex">\(x_t &lt; 1\)</span>'
    block = '<div class="arithmatex">\\[\ns = \\frac{1}{2}\n\\]</div>'
    made = site.on_page_content(f"<p>{inline}</p>{block}")
    assert made.count("<math") == 2
    assert "<mfrac>" in made
    assert "arithmatex" not in made
    assert "&lt;" in made or "&#x0003C;" in made


def test_a_notebook_becomes_a_page(tmp_path):
    picture = {"output_type": "display_data", "data": {"image/png": "aGk=", "text/plain": "fig"}}
    printed = {"output_type": "stream", "name": "stdout", "text": ["1 < 2\n"]}
    warned = {"output_type": "stream", "name": "stderr", "text": ["a warning"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "and [on](2_b.ipynb)"]},
        {"cell_type": "code", "source": ["show()"], "outputs": [printed, warned, picture]},
    ]
    path = tmp_path / "1_a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    files = dict(site.notebook_files(path))
    assert files["1_a_0.png"] == b"hi"
    page = files["1_a.md"]
    assert page.startswith("# Title")
    assert "[on](2_b.md)" in page
    assert "```python\nshow()\n```" in page
    assert "1 &lt; 2" in page
    assert "![output](1_a_0.png)" in page
    assert "a warning" not in page


def test_the_reference_lists_every_public_name():
    import ternary

    page = site.reference("ternary")
    assert "::: ternary.distillation.run.distill" in page
    assert page.count("\n::: ternary.") == len(ternary.__all__)


def test_grouped_names_are_taken_apart():
    text = """Draws.

    Args:
      height, width: pixels,
        multiples of 16.
      seed: of the noise.
    """
    assert grouped_names.one_each(text) == text.replace(
        "      height, width: pixels,\n        multiples of 16.\n",
        "      height: pixels,\n        multiples of 16.\n"
        "      width: pixels,\n        multiples of 16.\n",
    )
    assert grouped_names.one_each("a, b and c: no list") == "a, b and c: no list"
