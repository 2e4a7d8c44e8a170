"""What the guards found, a JSON line each in ``guards.jsonl`` of the run: written by rank 0. No torch.

{"schema": 1, "time": "2026-11-23T03:14:10.512+00:00", "attempt": 2, "step": 1041, "kind": "slow", "rank": 3,
 "text": "rank 3 takes 1.42 times ...", "ratio": 1.42}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stoker import canonical
from stoker.errors import Refusal
from stoker.files import append_line, read_jsonl

GUARDS, SCHEMA = "guards.jsonl", 1
#: ``spike``: a loss or gradient norm far above those before; ``rewind``: the run goes back; ``recompute``: a step gave
#: two results, which is hardware; ``nonfinite``: where a number first was not finite; ``mismatch``: replicas differ;
#: ``slow`` and ``slow_over``: a rank takes longer than its peers, and no longer does.
KINDS = ("spike", "rewind", "recompute", "nonfinite", "mismatch", "slow", "slow_over")


@dataclass(frozen=True)
class Finding:
    """``rank``: the one to blame, None where it is nobody's fault or cannot be said; ``values``: figures by name."""

    step: int
    kind: str
    text: str
    rank: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")


def write(run_dir: Path, attempt: int, finding: Finding) -> None:
    """Append a finding to the run's ``guards.jsonl``: rank 0 only."""
    line = {
        **{name: _to_json(value) for name, value in finding.values.items()},
        "schema": SCHEMA,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "attempt": attempt,
        "step": finding.step,
        "kind": finding.kind,
        "rank": finding.rank,
        "text": finding.text,
    }
    append_line(run_dir / GUARDS, canonical.dumps(line))


def _to_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run in the order in which they were written, as JSON objects; none where nothing was found.
    Refuses a damaged line, and a newer schema."""
    path = run_dir / GUARDS
    try:
        lines = read_jsonl(path)
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, start=1):
        if line.get("schema") != SCHEMA:
            raise Refusal(f"{path}, line {number}: schema {line.get('schema')!r} where this release reads {SCHEMA}")
    return lines
