"""A plan's pictures as figures, for a run's report and for the page of ``stoker plan --html``. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from parallel.planning.pictures.shapes import Picture
from pretrain.figures.markup import facts, figure, node, table, to_html
from pretrain.figures.style import STYLE
from stoker.version import VERSION

#: The page may use its own style sheet and nothing else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def picture_figure(picture: Picture) -> Element:
    numbers = table(picture.head, picture.rows, picture.words) if picture.rows else None
    return figure(picture.title, picture.unit, picture.drawing, *picture.notes, legend=picture.legend, numbers=numbers)


def plan_page(
    title: str, lead: str, known: Iterable[tuple[str, str]], pictures: Sequence[Picture], words: Sequence[str] = ()
) -> bytes:
    """One self-contained HTML file, light and dark: ``known`` facts (name, value), what is told in ``words`` (blocks of
    plain text), the ``pictures``."""
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", http_equiv="Content-Security-Policy", content=POLICY),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("title", title),
        node("style", STYLE),
    )
    header = node("header", node("h1", title), node("p", lead, class_="lead"))
    foot = node("footer", f"Stoker {VERSION}. Point at a cell, a work or a layer to see its numbers.")
    told = [node("pre", text) for text in words]
    body = node("body", header, facts(known), *told, *map(picture_figure, pictures), foot)
    return to_html(node("html", head, body, lang="en"))
