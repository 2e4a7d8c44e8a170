"""The folder of a launch in the run directory: ``launch/NNNN`` with launch.json, config.yaml and what became of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.rundir import ATTEMPTS, STAMP, prepare
from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic

LAUNCHES = "launch"


@dataclass(frozen=True)
class Folder:
    """``number``: of the launch, from 1. ``fresh``: there is no run directory yet."""

    run_dir: Path
    number: int
    fresh: bool

    @classmethod
    def next(cls, run_dir: Path) -> Folder:
        """Where the next launch of a run would be; nothing is written."""
        before = [int(path.name) for path in (run_dir / LAUNCHES).glob("*") if path.name.isdigit()]
        return cls(run_dir, max(before, default=0) + 1, not run_dir.exists())

    @property
    def path(self) -> Path:
        return self.run_dir / LAUNCHES / f"{self.number:04d}"

    def make(self) -> None:
        prepare(self.run_dir)
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise Refusal(f"{self.path} was made by another launch: launch again") from None
        except OSError as error:
            raise Refusal(f"{self.path} cannot be made: {error}") from None

    def remove(self) -> None:
        """Take back what ``make`` made."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # not empty: another launch was there before
            self.path.parent.rmdir()
            if self.fresh:
                (self.run_dir / ATTEMPTS).rmdir()
                (self.run_dir / STAMP).unlink()
                self.run_dir.rmdir()

    def record(self, scheduler: str, job: str, argv: Sequence[str]) -> None:
        """What was submitted, in ``submission.json``."""
        content = {"format": formats.stamp("submission", 1), "scheduler": scheduler, "job": job, "argv": list(argv)}
        write_atomic(self.path / "submission.json", json.dumps(content, indent=2) + "\n")
