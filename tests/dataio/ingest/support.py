"""One source, read: what came of it."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataio.documents import read_groups
from dataio.ingest.options import Source
from dataio.ingest.source import Unit, ingest, units


@dataclass
class Outcome:
    rows: list[dict[str, Any]]
    counts: Counter[str]
    quarantined: list[dict[str, Any]]
    lineage: dict[str, list[Any]]
    units: list[Unit]

    @property
    def texts(self) -> dict[str, str]:
        return {row["path"]: row["text"] for row in self.rows}

    def faults(self) -> dict[str, int]:
        """Malformed and skipped records by kind."""
        return {name: count for name, count in self.counts.items() if "." in name}


def read(base: Path, *paths: str, out: Path | None = None, **options: Any) -> Outcome:
    """Everything that a source of these paths in `base` holds, as a worker process would read it."""
    source = Source(name="s", paths=paths or (".",), **options)
    found = Outcome([], Counter(), [], {}, units(source, base))
    out = out or base.parent / f"{base.name}.out"
    for unit in found.units:
        where = [out / kind / f"{unit.number:05d}" for kind in ("documents", "quarantine", "inputs")]
        sent, sent_unit = pickle.loads(pickle.dumps((source, unit)))
        found.counts.update(ingest(sent, sent_unit, *where))
        found.rows += [row for group in read_groups(where[0]) for row in group.to_pylist()]
        found.quarantined += [json.loads(line) for line in where[1].read_text("ascii").splitlines()]
        found.lineage |= json.loads(where[2].read_text())
    assert found.counts["documents"] == len(found.rows)
    return found


def lay(base: Path, files: dict[str, str | bytes]) -> Path:
    """Files in a folder."""
    for name, content in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return base
