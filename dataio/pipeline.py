"""Stages in a row over the document files of a workspace: where files lie, and what a stage is a function of."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dataio.stages import Counts, Executor, Manifest, Stage, Task, Workspace, content_hash
from stoker import canonical
from stoker.errors import Refusal

#: Files that one call looks through for damage.
CHECKED_TOGETHER = 64


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
        return f"work/{stage}/units/{self.name}{suffix}"


@dataclass(frozen=True)
class Job:
    """A task before the hashes of what it reads are known. Paths relative to the workspace. `together`: files of which
    a task reads so many that their hashes are hashed, by what they are; `inputs`: what is no file of the workspace."""

    name: str
    run: Callable[[], Counts]
    reads: Sequence[str]
    writes: Sequence[str]
    together: Mapping[str, Sequence[str]] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)


class Pipeline:
    """Runs stages one after another. A stage's key holds the contents of what earlier ones wrote, so that a change
    repeats what follows from it and nothing else."""

    def __init__(self, folder: Path, executor: Executor) -> None:
        self.folder, self.executor = folder, executor
        self.space = Workspace(folder)
        self.stages: dict[str, list[Manifest]] = {}  # of what has run, in order
        self._hashes: dict[str, str] = {}
        self._sound: set[str] = set()  # files made in this run, or found to be as they were made

    def at(self, path: str) -> Path:
        return self.folder / path

    def stage(self, name: str, version: int, options: Mapping[str, Any], jobs: Sequence[Job]) -> list[Manifest]:
        """The manifests of the jobs, in their order; what is done already is not done again."""
        hashes: dict[int, str] = {}  # of lists of files, which jobs share

        def together(paths: Sequence[str]) -> str:
            if id(paths) not in hashes:
                hashes[id(paths)] = self.together(paths)
            return hashes[id(paths)]

        tasks = [
            Task(
                job.name,
                job.run,
                {
                    **job.inputs,
                    **{what: together(paths) for what, paths in job.together.items()},
                    **{path: self._hashes[path] for path in job.reads},
                },
                job.writes,
            )
            for job in jobs
        ]
        stage = Stage(name, version, options, tasks)
        todo = set(self.space.missing(stage))
        self._check({path for job in jobs if job.name in todo for paths in _read(job) for path in paths})
        found = self.space.run(stage, self.executor)
        manifests = [found[job.name] for job in jobs]
        for manifest in manifests:
            self._hashes.update(manifest.outputs)
            if manifest.task in todo:
                self._sound.update(manifest.outputs)
        self.stages[name] = manifests
        return manifests

    def together(self, paths: Sequence[str]) -> str:
        """One hash of many files that stages wrote."""
        return canonical.sha256([[path, self._hashes[path]] for path in paths])

    def _check(self, paths: set[str]) -> None:
        """That files which an earlier run made are what it made. Refuses what is not, and removes it, so that it is
        made again."""
        unknown = sorted(paths - self._sound)
        share = [unknown[i : i + CHECKED_TOGETHER] for i in range(0, len(unknown), CHECKED_TOGETHER)]
        calls = [partial(_damaged, self.folder, {path: self._hashes[path] for path in paths}) for paths in share]
        damaged = [path for _, found, _ in self.executor.results(calls) for path in found]
        if damaged:
            names = ", ".join(str(self.folder / path) for path in damaged)
            raise Refusal(
                f"{names}: damaged or changed since it was made, now removed: run the same command again to make it"
            )
        self._sound.update(unknown)


def _read(job: Job) -> Iterator[Sequence[str]]:
    yield job.reads
    yield from job.together.values()


def _damaged(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Files that do not have these hashes; they are removed."""
    found = [path for path, wanted in hashes.items() if content_hash(folder / path) != wanted]
    for path in found:
        (folder / path).unlink()
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's while the block runs. Refuses one in which another is at work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise Refusal(f"{folder}: is a file; give `output` the name of a folder") from None
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
