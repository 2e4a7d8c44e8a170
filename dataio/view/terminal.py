"""Documents in a terminal: tokens in turns of two colours, or between bars where there is no colour."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from dataio.view.shown import DOCUMENT, decisions, one_line, origin, said, visible, why
from dataio.view.viewer import Shown
from dataio.view.workspace import Member

#: Pieces in turn.
_STYLES = ("on grey23", "on dark_blue")
_BAR = "▏"


def draw(documents: Iterable[Shown], console: Console) -> None:
    """Print documents one after another."""
    for document in documents:
        console.print(Rule(Text(f"{one_line(document.source)} {document.number:,}"), align="left"))
        for name, value in facts(document):
            console.print(Text.assemble((f"{name:>12}  ", "dim"), value), soft_wrap=True)
        console.print()
        console.print(_text(document, console.color_system is not None), soft_wrap=True)
        hidden = document.stop - document.start - document.num_pieced
        if hidden > 0:
            console.print(Text(f"… and {hidden:,} tokens more", "dim"))
        console.print()


def facts(document: Shown) -> list[tuple[str, str]]:
    """(name, value) of what is known of a document besides its text, in one line each."""
    tokens = document.stop - document.start
    known = [
        ("id", document.id),
        ("tokens", f"{document.start:,} to {document.stop - 1:,}: {tokens:,} of {document.num_bytes:,} bytes"),
        ("language", document.language),
        ("from", origin(document)),
        ("weight", None if document.weight == 1 else f"{document.weight:.4g}"),
        ("flags", ", ".join(document.flags)),
        ("masked", "no token of it is a target" if document.masked else None),
    ]
    if record := document.record:
        known += [(name, said(record.facts.get(name))) for name in DOCUMENT if name in record.facts]
        known.append(("why", why(record)))
        known += [
            (f"{stage}:", "  ".join(f"{n}={v}" for n, v in values)) for stage, values in decisions(record) if values
        ]
        known += [("near copy", copy(member)) for member in document.copies]
    return [(name, one_line(value, 2000)) for name, value in known if value]


def copy(member: Member) -> str:
    state = "kept" if member.kept else "not kept"
    return f"{member.id[:12]} {state}: {member.source} {member.path}"


def _text(document: Shown, coloured: bool) -> Text:
    text = Text()
    for number, piece in enumerate(document.pieces):
        shown = visible(piece.text).replace("\n", "⏎\n")
        if coloured:
            text.append(shown, _STYLES[number % 2])
        else:
            text.append(f"{_BAR if number else ''}{shown}")
    return text
