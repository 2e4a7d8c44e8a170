"""Record the work times that the tests of stragglers look at:

    torchrun --standalone --nproc-per-node 2 -m tests.pretrain.guards.record_work_times OUT.json WHAT [STEPS]

A run of the preset tiny-dense (after ``make data``), and nothing else that is not in ``WHAT``, in words.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pretrain import run
from pretrain.guards.findings import Finding
from pretrain.guards.stragglers import Pace


def main(arguments: Sequence[str]) -> int:
    out, what, steps = arguments[0], arguments[1], int(arguments[2]) if len(arguments) > 2 else 1200
    seen: list[list[float]] = []

    def add(self: Pace, step: int, seconds: Sequence[float]) -> list[Finding]:
        seen.append([round(each, 5) for each in seconds])
        return []

    Pace.add = add  # type: ignore[method-assign]
    folder = Path(tempfile.gettempdir()) / f"work-times-{os.environ['MASTER_PORT']}"  # one for all ranks
    overrides = [f"run.steps={steps}", f"run.dir={folder}", "checkpoint.every=1000000", "log.every=1000000"]
    code = run.main(["tiny-dense", *overrides])
    if int(os.environ["RANK"]) == 0:
        shutil.rmtree(folder, ignore_errors=True)
        if code == 0:
            Path(out).write_text(json.dumps({"what": what, "seconds": seen}, separators=(",", ":")) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
