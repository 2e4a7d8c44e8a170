"""``report.html``: a run for somebody who was not there, in one file that opens from disk and loads nothing.

Rooms give fragments (elements), this file puts them in order. What could not be read is said at the top. No torch.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.figures.curves import curves, draws, heldout
from pretrain.figures.expected import expected
from pretrain.figures.layout import experts, layout
from pretrain.figures.markup import node, to_html
from pretrain.figures.record import Record, read_record
from pretrain.figures.run import attempts, configuration, header, run_facts, tiles, versions
from pretrain.figures.style import STYLE
from stoker.files import write_atomic
from stoker.version import VERSION

REPORT = "report.html"

SECTIONS = {
    "Attempts": attempts,
    "Training": curves,
    "Data": draws,
    "Held out": heldout,
    "Experts": experts,
    "Layout": layout,
    "A step": expected,
    "Versions": versions,
    "Configuration": configuration,
}
#: The page may use its own style sheet and nothing else: no script, no network, whatever is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(run_dir: Path) -> Path:
    """Write the report of a run, whatever state it is in, and return its path.

    Raises Refusal where ``run_dir`` is no run directory, or one of a newer release.
    """
    path = run_dir / REPORT
    write_atomic(path, page(read_record(run_dir)))
    return path


def page(record: Record) -> bytes:
    sections = [
        node("section", node("h2", title, id=_anchor(title)), *make(record)) for title, make in SECTIONS.items()
    ]
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", http_equiv="Content-Security-Policy", content=POLICY),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("title", f"{record.name}: run report"),
        node("style", STYLE),
    )
    links = node("nav", *(node("a", title, href=f"#{_anchor(title)}") for title in SECTIONS))
    foot = node("footer", f"Stoker {VERSION}. Point at a curve, a cell or a rank to see its numbers.")
    body = node("body", header(record), links, tiles(record), run_facts(record), *sections, foot)
    return to_html(node("html", head, body, lang="en"))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
