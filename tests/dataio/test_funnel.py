"""The funnel: everything that was read is either kept or dropped for one reason, and adds up."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dataio import funnel
from dataio.funnel import Amount
from dataio.stages import Manifest
from stoker.errors import Refusal


def manifest(stage: str, task: str, **counts: int) -> Manifest:
    return Manifest(stage, task, "", {}, {}, {}, {}, counts, 1, "")


@pytest.fixture
def made() -> funnel.Funnel:
    first = {"documents": 9, "documents/kept/python": 5, "bytes/kept/python": 500, "documents/near.copy/c": 4}
    second = {"documents/kept/python": 1, "bytes/kept/python": 7, "documents/code.<b>/c": 2, "bytes/code.<b>/c": 80}
    ingested = [manifest("ingest", "web/00000", **{"documents": 9, "malformed.not_utf8": 3, "skipped.empty": 1})]
    selected = [
        manifest("select", "web/00000", **first, **{"bytes/near.copy/c": 40}),
        manifest("select", "web/00001", **second),
        manifest("select", "books/00000", **{"documents/kept/en": 1, "bytes/kept/en": 1000}),
    ]
    encoded = [
        manifest("encode", "web/00000", **{"tokens/python": 100, "bytes/python": 400, "redacted": 2, "tokens": 130}),
        manifest("encode", "web/00001", **{"tokens/python": 2, "bytes/python": 7, "tokens/en": 0, "bytes/en": 0}),
    ]
    return funnel.count(ingested, selected, encoded)


def test_what_was_read_is_kept_or_dropped(made: funnel.Funnel) -> None:
    assert made.total() == Amount(13, 1627)
    assert made.total("web") == Amount(12, 627)
    assert made.total("web", "kept") == made.total("web", "kept", "python") == Amount(6, 507)
    assert made.total(reason="near") == made.total(reason="near.copy") == Amount(4, 40)
    assert made.total("web", "kept") + sum((a for _, a in made.reasons("web")), funnel.NOTHING) == made.total("web")
    assert [why for why, _ in made.reasons()] == ["code.<b>", "near.copy"]  # in the order of the stages
    assert made.sources == ["books", "web"]
    assert list(funnel.rows(made, "web")) == [
        ("read", "12", "0.0", "100.0%"),
        ("code.<b>", "2", "0.0", "12.8%"),
        ("near.copy", "4", "0.0", "6.4%"),
        ("kept", "6", "0.0", "80.9%"),
    ]


def test_it_is_read_as_it_was_written(made: funnel.Funnel, tmp_path: Path) -> None:
    funnel.write(made, tmp_path, "corpus")
    assert funnel.read(tmp_path) == made
    with pytest.raises(Refusal, match=r"funnel\.json"):
        funnel.read(tmp_path / "elsewhere")


def test_the_page_is_whole_and_nothing_in_it_is_markup(made: funnel.Funnel) -> None:
    text = funnel.page(made, "a <script>")
    assert "<script>" not in text and "<b>" not in text and "code.&lt;b&gt;" in text
    svg = ElementTree.fromstring(re.findall(r"<svg.*</svg>", text, re.DOTALL)[0])
    bars = [rect for rect in svg.iter("rect") if rect.get("height") == "26"]
    widths = {}
    for bar in bars:
        widths.setdefault(bar.get("y"), []).append(float(bar.get("width", "")))
    # Every bar is as wide as what the one above it left: what it keeps and what it drops.
    assert [round(sum(wide)) for wide in widths.values()] == [720, 720, round(720 * 1547 / 1627)]


def test_tokens_and_edits_are_told_by_language(made: funnel.Funnel) -> None:
    assert list(funnel.token_rows(made)) == [
        ("python", "0.00", "0.000", "3.99"),
        ("en", "0.00", "0.000", "-"),
        ("all", "0.00", "0.000", "3.99"),
    ]
    assert made.edits == {"addresses, keys and secrets replaced": 2}


def test_nothing_read_divides_by_nothing() -> None:
    empty = funnel.count([manifest("ingest", "web/00000", documents=0)], [])
    assert list(funnel.rows(empty)) == [("read", "0", "0.0", "-"), ("kept", "0", "0.0", "-")]
    assert "<svg" in funnel.page(empty, "none")
