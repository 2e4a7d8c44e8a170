"""The folder of a launch in the run directory: ``launch/NNNN`` with launch.json, config.yaml and what became of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.rundir import ATTEMPTS, STAMP, prepare
from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic

LAUNCHES = "launch"


@dataclass(frozen=True)
class Folder:
    """``number``: of the launch, from 1. ``missing``: the run directory and folders above it that are not there yet."""

    run_dir: Path
    number: int
    missing: tuple[Path, ...]

    @classmethod
    def next(cls, run_dir: Path) -> Folder:
        """Where the next launch of a run would be; nothing is written."""
        try:
            before = [int(path.name) for path in (run_dir / LAUNCHES).glob("*") if path.name.isdecimal()]
            missing = tuple(path for path in (run_dir, *run_dir.parents) if not path.exists())
            return cls(run_dir, max(before, default=0) + 1, missing)
        except OSError as error:
            raise Refusal(
                f"run directory {run_dir} cannot be made: {error.strerror}. Choose another run.dir or run.name"
            ) from None

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
            if self.missing:
                (self.run_dir / ATTEMPTS).rmdir()
                (self.run_dir / STAMP).unlink()
                for path in self.missing:
                    path.rmdir()

    def record(self, scheduler: str, job: str, argv: Sequence[str]) -> None:
        """What was submitted, in ``submission.json``."""
        content = {"format": formats.stamp("submission", 1), "scheduler": scheduler, "job": job, "argv": list(argv)}
        write_down(self.path / "submission.json", content, job)


def write_down(path: Path, content: Mapping[str, Any], job: str) -> None:
    """Write what was submitted as ``job``. A full disk costs the record, said on standard error, not the job."""
    try:
        write_atomic(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        print(f"job {job} is submitted, and {path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
