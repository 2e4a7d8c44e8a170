"""What could not be read: counted by kind, and the first of it kept to be looked at."""

from __future__ import annotations

from collections import Counter

from dataio.ingest.records import SAMPLE_BYTES, Malformed
from stoker import canonical

#: Samples that a unit keeps.
MAX_SAMPLES = 100


class Quarantine:
    """JSON lines of {file, row (null: the rest of the file), why, detail, sample}. A sample is cut to `SAMPLE_BYTES`
    and holds what is no text as escapes, so that no terminal and no reader of the file comes to harm."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lines: list[str] = []

    def add(self, file: str, malformed: Malformed) -> None:
        self.counts[f"malformed.{malformed.why}"] += 1
        if len(self._lines) < MAX_SAMPLES:
            sample = malformed.sample[:SAMPLE_BYTES].decode("utf-8", "backslashreplace")
            found = {"row": malformed.row, "why": malformed.why, "detail": malformed.detail, "sample": sample}
            self._lines.append(canonical.dumps({"file": file, **found}))

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)
