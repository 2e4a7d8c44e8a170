"""``stoker report SWEEP``: ``sweep.html``, the runs of a sweep beside each other, in one file that loads nothing."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from pathlib import Path

from launch.sweep import ledger
from launch.sweep.ledger import is_sweep
from launch.sweep.results import results
from pretrain.figures.markup import node, to_html
from pretrain.figures.style import STYLE
from pretrain.figures.sweep import Results, header, run_table, setting_table, sweep_facts, tiles
from pretrain.figures.sweep_plots import curves, effects, parallel
from stoker.files import write_atomic
from stoker.version import VERSION

__all__ = ["is_sweep", "page", "write_report"]

REPORT = "sweep.html"

SECTIONS = {
    "Settings": setting_table,
    "Runs": run_table,
    "Curves": curves,
    "Effects": effects,
    "All keys": parallel,
}
#: Added to the style sheet of reports.
MORE_STYLE = """
.line.faint { stroke-width: 1; opacity: .28 } .line.faint:hover { opacity: 1; stroke-width: 2; stroke: var(--ink) }
.line.points { stroke-width: 5; opacity: .45 }
.line.many { opacity: .1 } .line.near { stroke-width: 1.2; opacity: .8 }
.key.faint::before { opacity: .6 }
.upright { stroke: var(--soft); stroke-width: 1 }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 3.5px; stroke-linejoin: round }
.same { color: var(--soft) } .changed { font-weight: 600 } .remark { color: var(--soft); min-width: 180px }
td[data-v] { white-space: nowrap }
tr.apart td { background: var(--faint) }
td.state { font-weight: 500; white-space: nowrap } td.number, td a { white-space: nowrap } td a { color: inherit }
.sortable button { all: unset; cursor: pointer } .sortable button:focus-visible { outline: 2px solid var(--c0) }
.sortable th[aria-sort] { color: var(--ink) }
.sortable th[aria-sort=ascending] button::after { content: " ↑" }
.sortable th[aria-sort=descending] button::after { content: " ↓" }
.tall { max-height: 520px; overflow-y: auto; border: 1px solid var(--rule); border-radius: 8px;
  background: var(--card); padding: 0 14px }
.sortable { border-collapse: separate; border-spacing: 0; min-width: 60% }
.sortable th { padding-right: 20px } .sortable th.number { text-align: right }
.tall thead th { position: sticky; top: 0; background: var(--card); padding-top: 10px }
@media print { .tall { max-height: none } }
"""
#: A click on a head sorts by its column: by number where cells have one, those without last; else by text.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, index) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map(row => {
      const cell = row.cells[index];
      return [row, cell.dataset.v === undefined ? null : Number(cell.dataset.v), cell.textContent];
    });
    const numbers = rows.some(entry => entry[1] !== null);
    rows.sort((a, b) => !numbers ? sign * a[2].localeCompare(b[2], undefined, {numeric: true})
      : a[1] === null ? (b[1] === null ? 0 : 1) : b[1] === null ? -1 : sign * (a[1] - b[1]));
    body.append(...rows.map(entry => entry[0]));
  }));
}
"""
#: The page runs this script and no other, whatever a name or a value in it says.
_HASH = b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"


def write_report(root: Path) -> Path:
    """Write the report of a sweep, whatever state it is in, and return its path. Refuses a folder that is none's."""
    path = root / REPORT
    write_atomic(path, page(results(ledger.read(root))))
    return path


def page(found: Results) -> bytes:
    sections = []
    for title, make in SECTIONS.items():
        if parts := make(found):
            sections.append(node("section", node("h2", title, id=title.lower().replace(" ", "-")), *parts))
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", http_equiv="Content-Security-Policy", content=POLICY),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("title", f"{found.name}: sweep report"),
        node("style", STYLE + MORE_STYLE),
    )
    titles = [section[0] for section in sections]
    links = node("nav", *(node("a", title.text, href=f"#{title.get('id')}") for title in titles))
    foot = node("footer", f"Stoker {VERSION}. Point at a line, a point or a value to see what it is.")
    body = node("body", header(found), links, tiles(found), sweep_facts(found), *sections, foot, node("script", SCRIPT))
    return to_html(node("html", head, body, lang="en"))
