"""Stages in a row over the document files of a workspace: where files lie, and what a stage is a function of."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataio.stages import Counts, Executor, Manifest, Stage, Task, Workspace
from stoker import canonical
from stoker.errors import Refusal


@dataclass(frozen=True)
class Unit:
    """One document file: the work of one task in most stages. Paths are relative to the workspace."""

    source: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.source}/{self.number:05d}"

    @property
    def documents(self) -> str:
        return f"documents/{self.name}.parquet"

    def attributes(self, stage: str) -> str:
        return f"attributes/{stage}/{self.name}.parquet"

    def alive(self, stage: str) -> str:
        """Which documents no stage up to this one dropped."""
        return f"work/alive/{stage}/{self.name}.npy"

    def work(self, stage: str, suffix: str = "") -> str:
        """What later tasks want of this one's."""
        return f"work/{stage}/{self.name}{suffix}"


@dataclass(frozen=True)
class Job:
    """A task before the hashes of what it reads are known. Paths relative to the workspace."""

    name: str
    run: Callable[[], Counts]
    reads: Sequence[str]
    writes: Sequence[str]
    inputs: Mapping[str, str] = field(default_factory=dict)  # what it reads from outside, with its hash


class Pipeline:
    """Runs stages one after another. A stage's key holds the contents of what earlier ones wrote, so that a change
    repeats what follows from it and nothing else."""

    def __init__(self, folder: Path, executor: Executor) -> None:
        self.folder, self.executor = folder, executor
        self.space = Workspace(folder)
        self.stages: dict[str, list[Manifest]] = {}  # of what has run, in order
        self._hashes: dict[str, str] = {}

    def at(self, path: str) -> Path:
        return self.folder / path

    def stage(self, name: str, version: int, options: Mapping[str, Any], jobs: Sequence[Job]) -> list[Manifest]:
        """The manifests of the jobs, in their order; what is done already is not done again."""
        tasks = [
            Task(job.name, job.run, {**job.inputs, **{path: self._hashes[path] for path in job.reads}}, job.writes)
            for job in jobs
        ]
        found = self.space.run(Stage(name, version, options, tasks), self.executor)
        manifests = [found[job.name] for job in jobs]
        for manifest in manifests:
            self._hashes.update(manifest.outputs)
        self.stages[name] = manifests
        return manifests

    def together(self, paths: Iterable[str]) -> str:
        """One hash of many files that stages wrote: for a job that reads all of them."""
        return canonical.sha256([[path, self._hashes[path]] for path in paths])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's while the block runs. Refuses one in which another is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Refusal(
            f"{folder}: another process is preparing data here; wait for it, or choose another output"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
