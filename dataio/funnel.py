"""The funnel: how much text came in, what each rule dropped, and what is left, by source and language.

Counted from the manifests of ``select`` and ``ingest``; written as ``funnel.json``, drawn in ``report.html`` (one file
that loads nothing) and in the terminal by ``stoker data stats``.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from dataio.selection import KEPT
from dataio.stages import Manifest, total
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.version import VERSION

FORMAT = "stoker.funnel"
#: Stages that drop documents, in their order.
STAGES = ("licence", "code", "language", "prose", "redact", "exact", "near", "substring", "decontaminate")
#: Languages that the picture tells apart; the rest are drawn as one.
SHOWN_LANGUAGES = 7
#: Counts of ``encode`` and ``substring-match``, and what they are to a reader.
EDITS = {
    "rewritten": "documents rewritten",
    "redacted": "addresses, keys and secrets replaced",
    "cut_bytes": "bytes of repeated passages cut",
    "emptied": "documents of which nothing was left",
    "forgotten": "passages that were not compared with all others, for want of memory_bytes",
}
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#bab0ac")
_DROPPED = "#e15759"


class Amount(NamedTuple):
    documents: int
    bytes: int

    def __add__(self, other: Any) -> Amount:
        return Amount(self.documents + other.documents, self.bytes + other.bytes)


NOTHING = Amount(0, 0)


@dataclass(frozen=True)
class Funnel:
    """`cells`: (source, reason or "kept", language) -> amount. `unread`: source -> records ingest could not use, by
    why. Once there are tokens, `tokens`: language -> (bytes as encoded, tokens), and `edits`: what was changed in the
    texts that were kept."""

    cells: Mapping[tuple[str, str, str], Amount]
    unread: Mapping[str, Mapping[str, int]]
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    edits: Mapping[str, int] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        return sorted({*self.unread, *(source for source, _, _ in self.cells)})

    def total(self, source: str | None = None, reason: str | None = None, language: str | None = None) -> Amount:
        """Of the cells that agree with what is given; `reason` may be a stage's name, for all its rules."""
        return sum(
            (
                amount
                for (of, why, spoken), amount in self.cells.items()
                if source in (None, of)
                and language in (None, spoken)
                and (reason is None or reason == why or reason == why.partition(".")[0])
            ),
            NOTHING,
        )

    def reasons(self, source: str | None = None) -> list[tuple[str, Amount]]:
        """Why documents were dropped, in the order of the stages, the most bytes first within one."""
        found: dict[str, Amount] = defaultdict(lambda: NOTHING)
        for (of, why, _), amount in self.cells.items():
            if why != KEPT and source in (None, of):
                found[why] += amount
        return sorted(found.items(), key=lambda item: (_place(item[0]), -item[1].bytes, item[0]))

    def languages(self) -> list[tuple[str, Amount]]:
        """Of what was read, the most bytes first."""
        found: dict[str, Amount] = defaultdict(lambda: NOTHING)
        for (_, _, language), amount in self.cells.items():
            found[language] += amount
        return sorted(found.items(), key=lambda item: (-item[1].bytes, item[0]))


def _place(reason: str) -> int:
    stage = reason.partition(".")[0]
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def count(ingested: Iterable[Manifest], selected: Iterable[Manifest], encoded: Iterable[Manifest] = ()) -> Funnel:
    """From the manifests of these stages, whose tasks are named <source>/<unit>."""
    documents: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for manifest in selected:
        source = manifest.task.partition("/")[0]
        for key, number in manifest.counts.items():
            what, _, cell = key.partition("/")
            if what in ("documents", "bytes") and cell:
                reason, _, language = cell.partition("/")
                (documents if what == "documents" else sizes)[source, reason, language] += number
    unread: dict[str, Counter[str]] = defaultdict(Counter)
    for manifest in ingested:
        source = manifest.task.partition("/")[0]
        found = {key: n for key, n in manifest.counts.items() if key.startswith(("malformed.", "skipped."))}
        unread[source].update(found)
    sums = total(encoded)
    tokens = {key.partition("/")[2]: n for key, n in sums.items() if key.startswith("tokens/")}
    return Funnel(
        {cell: Amount(n, sizes[cell]) for cell, n in sorted(documents.items())},
        unread,
        {language: (sums[f"bytes/{language}"], n) for language, n in tokens.items()},
        {name: sums[key] for key, name in EDITS.items() if sums.get(key)},
    )


def write(funnel: Funnel, folder: Path, title: str) -> None:
    """``funnel.json`` and ``report.html``."""
    content = {
        "format": formats.stamp(FORMAT, 1),
        "cells": [[*cell, *amount] for cell, amount in funnel.cells.items()],
        "unread": {source: dict(sorted(why.items())) for source, why in sorted(funnel.unread.items())},
        "tokens": {language: list(amounts) for language, amounts in funnel.tokens.items()},
        "edits": dict(funnel.edits),
    }
    write_atomic(folder / "funnel.json", canonical.dumps(content))
    write_atomic(folder / "report.html", page(funnel, title))


def read(folder: Path) -> Funnel:
    """Of a finished preparation. Refuses a folder that has none."""
    path = folder / "funnel.json"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: cannot be read ({error}); run `stoker data prepare` to its end") from None
    formats.require(content, FORMAT, 1, path)
    cells = {(source, why, language): Amount(n, size) for source, why, language, n, size in content["cells"]}
    tokens = {language: (size, n) for language, (size, n) in content["tokens"].items()}
    return Funnel(cells, content["unread"], tokens, content["edits"])


def rows(funnel: Funnel, source: str | None = None) -> Iterator[tuple[str, str, str, str]]:
    """(what, documents, megabytes, share of the bytes read), from what was read to what was kept."""
    read = funnel.total(source)

    def row(what: str, amount: Amount) -> tuple[str, str, str, str]:
        share = f"{amount.bytes / read.bytes:.1%}" if read.bytes else "-"
        return what, f"{amount.documents:,}", f"{amount.bytes / 1e6:,.1f}", share

    yield row("read", read)
    for reason, amount in funnel.reasons(source):
        yield row(reason, amount)
    yield row(KEPT, funnel.total(source, KEPT))


def page(funnel: Funnel, title: str) -> str:
    """The report, as HTML that may use its own style and nothing else."""
    sections = ["<h2>What is left after each stage</h2>", picture(funnel)]
    for source in (None, *funnel.sources):
        sections.append(f"<h2>{escape(source or 'All sources')}</h2>")
        sections.append(_table(("", "documents", "MB", "of the bytes"), rows(funnel, source)))
        if source and (unread := funnel.unread.get(source)):
            sections.append(_table(("not read", "records"), ((k, f"{n:,}") for k, n in sorted(unread.items()))))
    sections.append("<h2>Languages</h2>")
    sections.append(_table(("language", "MB read", "MB kept", "kept"), _language_rows(funnel)))
    if funnel.tokens:
        sections.append("<h2>Tokens</h2>")
        sections.append(_table(("language", "MB", "million tokens", "bytes a token"), token_rows(funnel)))
    if funnel.edits:
        sections.append("<h2>Changed in what is kept</h2>")
        sections.append(_table(("", "number"), ((name, f"{n:,}") for name, n in funnel.edits.items())))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(sections)}"
        f"<footer>Stoker {VERSION}</footer></body></html>\n"
    )


def token_rows(funnel: Funnel) -> Iterator[tuple[str, str, str, str]]:
    """(language, megabytes, millions of tokens, bytes a token), the most tokens first, then all."""
    found = sorted(funnel.tokens.items(), key=lambda item: (-item[1][1], item[0]))
    sums = [sum(amounts) for amounts in zip((0, 0), *funnel.tokens.values())]
    for language, (size, tokens) in [*found, ("all", sums)]:
        share = f"{size / tokens:.2f}" if tokens else "-"
        yield language, f"{size / 1e6:,.2f}", f"{tokens / 1e6:,.3f}", share


def _language_rows(funnel: Funnel) -> Iterator[tuple[str, ...]]:
    for language, read in funnel.languages():
        kept = funnel.total(reason=KEPT, language=language)
        share = f"{kept.bytes / read.bytes:.1%}" if read.bytes else "-"
        yield language, f"{read.bytes / 1e6:,.2f}", f"{kept.bytes / 1e6:,.2f}", share


def picture(funnel: Funnel) -> str:
    """One bar a stage, as SVG: what is left, by language, and in red what the stage dropped."""
    languages = [language for language, _ in funnel.languages()]
    shown = languages[:SHOWN_LANGUAGES]
    read = funnel.total().bytes or 1
    left = {language: amount.bytes for language, amount in funnel.languages()}
    width, label, height, gap = 720, 130, 26, 10
    bars, top = [], 30
    for stage in ("read", *STAGES):
        dropped = Counter(
            {language: funnel.total(reason=stage, language=language).bytes for language in languages}
            if stage != "read"
            else {}
        )
        if stage != "read" and not any(why.partition(".")[0] == stage for why, _ in funnel.reasons()):
            continue
        for language, size in dropped.items():
            left[language] -= size
        parts = [(language, left[language], colour) for language, colour in zip(shown, _COLOURS)]
        parts.append(("other languages", sum(left[language] for language in languages[SHOWN_LANGUAGES:]), _COLOURS[-1]))
        parts.append((f"dropped by {stage}", dropped.total(), _DROPPED))
        bars.append(f'<text x="{label - 8}" y="{top + height / 2 + 4}" text-anchor="end">{escape(stage)}</text>')
        at = float(label)
        for name, size, colour in parts:
            wide = size / read * width
            if size:
                tip = f"{name}: {size / 1e6:,.1f} MB, {size / read:.1%}"
                bars.append(
                    f'<rect x="{at:.1f}" y="{top}" width="{wide:.1f}" height="{height}" fill="{colour}">'
                    f"<title>{escape(tip)}</title></rect>"
                )
            at += wide
        rest = sum(left.values())
        bars.append(f'<text x="{at + 8:.1f}" y="{top + height / 2 + 4}">{rest / 1e6:,.1f} MB, {rest / read:.0%}</text>')
        top += height + gap
    inside = "".join([*_legend(shown, label), *bars])
    return f'<svg viewBox="0 0 {label + width + 130} {top}" role="img">{inside}</svg>'


def _legend(shown: Sequence[str], left: int) -> Iterator[str]:
    names = [*zip(shown, _COLOURS), ("other", _COLOURS[-1]), ("dropped here", _DROPPED)]
    at = left
    for name, colour in names:
        yield f'<rect x="{at}" y="4" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{at + 16}" y="14">{escape(name)}</text>'
        at += 32 + 8 * len(name)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:1020px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
svg{width:100%;height:auto}svg text{font-size:13px;fill:currentColor}
table{border-collapse:collapse;margin:.5rem 0}th,td{padding:.15rem .8rem;text-align:right;border-bottom:1px solid #8884}
th:first-child,td:first-child{text-align:left}tbody tr:last-child{font-weight:600}footer{margin-top:2rem;opacity:.6}
"""
