"""Requests and submissions of the tests, from real presets or the tiny run."""

from __future__ import annotations

from pathlib import Path

from launch.launching.folder import Folder
from launch.launching.job import Prepared, prepare
from launch.launching.layout import Request
from launch.launching.slurm import Submission, submission

PRESET = "hybrid-moe-30b-a3b"


def prepared(
    *overrides: str, config: str = PRESET, hardware: str = "gb200-nvl72", nodes: int = 16, ranks: int | None = None
) -> Prepared:
    return prepare(Request(config, overrides, hardware, nodes, ranks), lambda text: None)


def on_slurm(ready: Prepared) -> Submission:
    return submission(ready, Folder.next(ready.config.run_dir))


def value(argv: list[str], option: str) -> str:
    """The value of --option=value, which is there once."""
    (found,) = [word.partition("=")[2] for word in argv if word.partition("=")[0] == option]
    return found


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
