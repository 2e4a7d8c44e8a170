"""Work that can be killed at any moment and goes on where it stopped: stages of tasks, each done once.

A task writes files whose names are its own, and leaves a manifest when they are whole. Its key is the hash of what
decides its output: the stage's version, its options, and the contents of what it reads. A task whose manifest has that
key is not run again. So a run that was killed ends with the same bytes as one that was not, and a changed option
repeats its stage and what follows from it, nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import xxhash

from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.files import append_line, sync_directory, write_atomic
from stoker.progress import progress
from stoker.version import VERSION

FORMAT = "stoker.prepare.task"

#: What a task counted: documents in and out, bytes, reasons.
Counts = dict[str, int]


@dataclass(frozen=True)
class Task:
    """`run()` writes `outputs`, paths relative to the workspace, and returns counts. It is called in another process,
    so it is a function of a module, or a partial of one. `name`: unique in its stage. `inputs`: {what: its hash}.
    """

    name: str
    run: Callable[[], Counts]
    inputs: Mapping[str, str]
    outputs: Sequence[str]


@dataclass(frozen=True)
class Stage:
    """Tasks that do not depend on each other. `version` changes when the same inputs would give other outputs."""

    name: str
    version: int
    options: Mapping[str, Any]
    tasks: Sequence[Task]


@dataclass(frozen=True)
class Manifest:
    """What a finished task left: {output: hash of its contents} and counts."""

    stage: str
    task: str
    key: str
    inputs: Mapping[str, str]
    options: Mapping[str, Any]
    outputs: Mapping[str, str]
    sizes: Mapping[str, int]
    counts: Counts
    version: int  # of the stage
    stoker: str  # the release that did it


T = TypeVar("T")


class Executor(Protocol):
    """Runs calls somewhere and yields (index, what it returned, seconds) as they end. The first error ends it."""

    def results(self, calls: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T, float]]: ...


class Workspace:
    """A folder of outputs, with ``manifests/<stage>/<task>.json`` of what is finished.

    Files of one writer: the process that runs the stages writes manifests and ``timings.jsonl`` (seconds of every task,
    the only thing that differs from run to run); tasks write their outputs.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def manifest(self, stage: str, task: str) -> Manifest | None:
        """Of a finished task. Refuses one that is damaged or newer."""
        path = self._manifest_path(stage, task)
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise Refusal(f"{path}: cannot be read ({error}); remove it and the task is done again") from None
        formats.require(content, FORMAT, 1, path)
        content.pop("format")
        try:
            return Manifest(**content)
        except TypeError as error:
            raise Refusal(f"{path}: not what was written ({error}); remove it and the task is done again") from None

    def run(self, stage: Stage, executor: Executor) -> dict[str, Manifest]:
        """Do what is not done yet; the manifests of all tasks, by name, in the stage's order.

        Refusal from a task, or for what went wrong with its files, names the task; what others finished stays.
        """
        names = [task.name for task in stage.tasks]
        assert len(set(names)) == len(names), f"{stage.name}: two tasks of one name"
        keys = {task.name: _key(stage, task) for task in stage.tasks}
        done = {task.name: self._finished(stage, task, keys[task.name]) for task in stage.tasks}
        todo = [task for task in stage.tasks if done[task.name] is None]
        written = [self._manifest_path(stage.name, task.name) for task in todo]
        written += [self.folder / name for task in todo for name in task.outputs]
        for folder in {path.parent for path in written}:
            _remove_torn(folder)
        self._forget(stage.name, todo)
        with progress(stage.name, len(todo)) as advance:
            calls = [_Call(stage.name, task.name, task.run, self.folder, tuple(task.outputs)) for task in todo]
            for index, made, seconds in executor.results(calls):
                task = todo[index]
                done[task.name] = self._finish(stage, task, keys[task.name], made)
                line = {"stage": stage.name, "task": task.name, "seconds": seconds, **_bytes(made.counts)}
                append_line(self.folder / "timings.jsonl", canonical.dumps(line))
                advance(1)
        self._forget_others(stage)
        return {name: manifest for name in names if (manifest := done[name]) is not None}

    def missing(self, stage: Stage) -> list[str]:
        """Tasks that `run` would do."""
        return [task.name for task in stage.tasks if self._finished(stage, task, _key(stage, task)) is None]

    def _forget_others(self, stage: Stage) -> None:
        """Tasks of the stage that there are no more."""
        known = {self._manifest_path(stage.name, task.name) for task in stage.tasks}
        for path in (self.folder / "manifests" / stage.name).rglob("*.json"):
            if path not in known:
                path.unlink()

    def _forget(self, stage: str, tasks: Sequence[Task]) -> None:
        """A task that is done again is not done from here on: a manifest that outlived its outputs, and was believed
        once an option came back, would name the wrong ones."""
        paths = [self._manifest_path(stage, task.name) for task in tasks]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            if folder.is_dir():
                sync_directory(folder)

    def _finished(self, stage: Stage, task: Task, key: str) -> Manifest | None:
        manifest = self.manifest(stage.name, task.name)
        if manifest is None or manifest.key != key:
            return None
        whole = all(_size(self.folder / name) == size for name, size in manifest.sizes.items())
        return manifest if whole else None

    def _finish(self, stage: Stage, task: Task, key: str, made: Made) -> Manifest:
        manifest = Manifest(
            stage=stage.name,
            task=task.name,
            key=key,
            inputs=dict(task.inputs),
            options=dict(stage.options),
            outputs=made.outputs,
            sizes=made.sizes,
            counts=dict(sorted(made.counts.items())),
            version=stage.version,
            stoker=VERSION,
        )
        path = self._manifest_path(stage.name, task.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, canonical.dumps({"format": formats.stamp(FORMAT, 1), **vars(manifest)}))
        return manifest

    def _manifest_path(self, stage: str, task: str) -> Path:
        return self.folder / "manifests" / stage / f"{task}.json"


def _remove_torn(folder: Path) -> None:
    """What killed writers left in a folder: hidden names, see ``write_atomic`` and ``ParquetFile``."""
    for path in folder.glob(".*"):
        if path.suffix in (".tmp", ".partial") and path.is_file():
            path.unlink()


def content_hash(path: str | os.PathLike[str]) -> str:
    """Hex xxh3-128 of a file's bytes: finds damage and change at the speed of the disk, not an attacker."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def total(manifests: Iterable[Manifest]) -> Counts:
    """Counts of several tasks together."""
    sums = Counter[str]()
    for manifest in manifests:
        sums.update(manifest.counts)
    return dict(sorted(sums.items()))


def _key(stage: Stage, task: Task) -> str:
    return canonical.sha256(
        [stage.name, stage.version, dict(stage.options), task.name, dict(task.inputs), [*task.outputs]]
    )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _bytes(counts: Counts) -> Counts:
    return {"bytes": counts["bytes_in"]} if "bytes_in" in counts else {}


@dataclass(frozen=True)
class Made:
    """What a task counted, and the hash and size of each output."""

    counts: Counts
    outputs: dict[str, str]
    sizes: dict[str, int]


@dataclass(frozen=True)
class _Call:
    """A task's function with errors that name the task; it hashes the outputs where they were written."""

    stage: str
    task: str
    run: Callable[[], Counts]
    folder: Path
    outputs: tuple[str, ...]

    def __call__(self) -> Made:
        with room_for(f"{self.stage}, {self.task}"):
            try:
                counts = self.run()
            except Refusal as refusal:
                raise Refusal(f"{self.stage}, {self.task}: {refusal}") from None
        paths = {name: self.folder / name for name in self.outputs}
        absent = [name for name, path in paths.items() if not path.is_file()]
        if absent:
            raise Refusal(f"{self.stage}, {self.task}: ended without writing {', '.join(absent)}")
        hashes = {name: content_hash(path) for name, path in paths.items()}
        return Made(counts, hashes, {name: path.stat().st_size for name, path in paths.items()})


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """A full disk is refused in words while the block runs."""
    try:
        yield
    except OSError as error:
        # numpy tells of a short write in words, without a number.
        short = error.errno is None and "requested and" in str(error)
        if not short and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Refusal(
            f"{what}: no space left for {error.filename or 'its output'}; what is finished is kept: make room and run "
            "the same command again"
        ) from None


class LocalPool:
    """Processes of this machine; one `workers` runs the calls here, one after another.

    A context manager within which they stay: a process takes seconds to import and compile what it needs. Otherwise
    they end with the calls. They are started afresh (no fork: threads of libraries do not survive one) and end when
    this process does, also where it is killed.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._stays = False
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalPool:
        self._stays = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stays = False
        self._close()

    def results(self, calls: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T, float]]:
        if self.workers <= 1 or len(calls) <= 1:
            for index, call in enumerate(calls):
                yield (index, *_timed(call))
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_begin, initargs=(os.getpid(),))
        ended = False
        try:
            indices: dict[Future[tuple[T, float]], int] = {
                self._pool.submit(_timed, call): index for index, call in enumerate(calls)
            }
            for future in as_completed(indices):
                yield (indices[future], *future.result())
            ended = True
        except BrokenProcessPool:
            raise Refusal(
                "a worker process died: killed from outside, or for want of memory; what is finished is kept: "
                "give it fewer workers or more memory and run the same command again"
            ) from None
        finally:
            if not (ended and self._stays):
                self._close()

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    made = call()
    return made, round(time.perf_counter() - start, 4)


def _begin(parent: int) -> None:
    for library in ("RAYON", "OMP", "NUMBA"):  # a worker is a core
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    _die_with(parent)


def _die_with(parent: int) -> None:
    """This process is killed when its parent ends, however it ends (Linux: prctl(2), PR_SET_PDEATHSIG); an interrupt
    from the keyboard is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:
        os._exit(1)
