"""HTML as a tree, so that every text is escaped where the tree is written."""

from __future__ import annotations

import json
from typing import Any
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None


def element(tag: str, *children: Child, **attributes: Any) -> Element:
    """An HTML element.

    Args:
      tag: its name.
      children: elements and texts, in order; None is left out.
      attributes: `class_` is class, `aria_label` is aria-label; True is an attribute without a
        value, None and False none at all.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            text = "" if value is True else str(value)
            made.set(name.rstrip("_").replace("_", "-"), text)
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None and last is None:
            made.text = (made.text or "") + child
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + child
    return made


def section(title: str, *children: Child) -> Element:
    """A part of the page under a heading."""
    return element("section", element("h2", title), *children)


def to_html(*elements: Element) -> str:
    """Elements as HTML text."""
    return "\n".join(tostring(each, encoding="unicode", method="html") for each in elements)


def json_in_html(value: Any) -> str:
    """JSON that may stand inside a script element: no `<` ends it early."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def table(head: list[str], rows: list[list[Child]], **attributes: Any) -> Element:
    """A table that scrolls by itself where the page is narrow; the first column are headers."""
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    titles = element("tr", *(element("th", title, scope="col") for title in head))
    whole = element("table", element("thead", titles), element("tbody", *body), **attributes)
    # A region that scrolls must be reachable by keyboard.
    return element("div", whole, class_="scroll", tabindex="0", role="group", aria_label=head[0])
