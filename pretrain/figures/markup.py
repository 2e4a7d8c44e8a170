"""The report's markup as a tree, and numbers as people read them.

A page is built of elements, never of text: what comes from a file cannot become a tag, an attribute or a script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

UNKNOWN = "unknown"


def node(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """An element of HTML or SVG. ``class_`` stands for class, ``text_anchor`` for text-anchor; None is left out."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    element = Element(tag, {name: str(value) for name, value in named.items() if value is not None})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + child
        elif child:
            element.text = (element.text or "") + child
    return element


def to_html(page: Element) -> bytes:
    """The page as a file. Characters that UTF-8 has not (a lone surrogate in a name) become references to them."""
    return b"<!doctype html>\n" + tostring(page, "unicode", method="html").encode("utf-8", "xmlcharrefreplace")


def table(head: Sequence[str], rows: Iterable[Sequence[str | Element]], text_columns: int = 1) -> Element:
    """A table; the first ``text_columns`` columns hold text, the others numbers, aligned on the right."""

    def row(tag: str, cells: Sequence[str | Element]) -> Element:
        look = [None if index < text_columns else "number" for index in range(len(cells))]
        return node("tr", *(node(tag, cell, class_=kind) for cell, kind in zip(cells, look, strict=True)))

    body = node("tbody", *(row("td", cells) for cells in rows))
    return node("div", node("table", node("thead", row("th", head)), body), class_="scroll")


def facts(pairs: Iterable[tuple[str, str | Element]]) -> Element:
    """A table of names and what they are, in words."""
    body = (node("tr", node("th", name, scope="row"), node("td", value)) for name, value in pairs)
    return node("div", node("table", node("tbody", *body), class_="facts"), class_="scroll")


def figure(
    title: str,
    unit: str,
    picture: Element,
    *below: Element | str,
    legend: Sequence[tuple[str, str]] = (),
    numbers: Element | None = None,
) -> Element:
    """A picture under its title; ``below`` it a summary and notes, and the ``numbers`` for who asks for them.
    ``legend``: (class of the line, what it is)."""
    keys = node("p", *(node("span", name, class_=f"key {look}") for look, name in legend), class_="legend")
    return node(
        "figure",
        node("figcaption", node("b", title), node("span", unit, class_="unit")),
        keys if legend else None,
        node("div", picture, class_="scroll"),
        *(item if isinstance(item, Element) else node("p", item, class_="note") for item in below if item != ""),
        None if numbers is None else node("details", node("summary", "Numbers"), numbers),
    )


def number(value: float | None, digits: int = 4) -> str:
    """``digits`` significant ones, thousands apart; None is unknown.

    >>> number(1234567.0), number(0.00031415), number(None), number(float("nan"))
    ('1,234,567', '3.142e-04', 'unknown', 'NaN')
    """
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == 0 or isinstance(value, int):
        return f"{value:,}" if isinstance(value, int) else "0"
    size = math.floor(math.log10(abs(value)))
    if size < -3 or size >= 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def short(value: float) -> str:
    """A large count in words: 3.66 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def share(value: float) -> str:
    return f"{100 * value:.2f} %"


def duration(seconds: float) -> str:
    """3 h 25 min, 4 min 12 s, 8.3 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
