"""One launch of a run: what it ran on, and how it ended. Kept in ``attempts/NNNN`` of the run directory. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.secrets import mask
from stoker.version import VERSION, code_commit

#: Environment variables that an attempt records, by name or by prefix: what changes speed or numerics, and the job.
#: Nothing else of the environment is written down.
RECORDED = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_",
    "GROUP_WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MKL_NUM_THREADS",
    "NCCL_",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_NNODES",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCH_NCCL_",
    "WORLD_SIZE",
)
PACKAGES = (
    "torch", "megatron-core", "numpy", "numba", "zarr", "pydantic", "tokenizers", "wandb",
    "flash-attn", "apex", "transformer-engine", "flash-linear-attention",
)  # fmt: skip


class ExitClass(Enum):
    """How an attempt ended; ``code`` is the exit code of the command."""

    DONE = "done"
    REFUSED = "refused"
    STOPPED = "stopped"
    PREEMPTED = "preempted"
    FAULT = "fault"

    @property
    def code(self) -> int:
        return {"done": 0, "fault": 1, "refused": 2, "stopped": 3, "preempted": 4}[self.value]


#: What ended an attempt, more closely than its class, from what explains most to what is only a consequence.
#: ``device``: a GPU or its link reported an error; ``mismatch``: replicas that differ; ``stopped``: a stopped process;
#: ``signal``: a rank was killed; ``exception``: an error that Python raised; ``hang``: no progress; ``store``: ranks
#: could not meet, or lost each other; ``unknown``: nobody could say.
KINDS = (
    "refused", "verdict", "preempted", "done", "node", "device", "oom", "mismatch", "stopped", "signal", "exception",
    "hang", "slow", "store", "unknown",
)  # fmt: skip
_KIND_OF_CLASS = {
    ExitClass.DONE: "done",
    ExitClass.REFUSED: "refused",
    ExitClass.STOPPED: "verdict",
    ExitClass.PREEMPTED: "preempted",
    ExitClass.FAULT: "unknown",
}
EXIT_FORMAT, EXIT_VERSION = "exit", 2


class Fault(RuntimeError):
    """An error that knows more closely what is wrong: ``kind`` (of ``KINDS``), and the rank and step to blame where
    that is not the one that raises it."""

    def __init__(self, kind: str, cause: str, rank: int | None = None, step: int | None = None) -> None:
        super().__init__(cause)
        self.kind, self.rank, self.step = kind, rank, step


@dataclass(frozen=True)
class Exit:
    """Why an attempt ended, and the rank that knows: None where no rank is to blame.

    ``kind``: one of ``KINDS``, by default what the class says; ``step``: the one under way; ``host``: where the rank
    ran; ``fingerprint``: equal for two failures that are the same, None where that cannot be said; ``stacks``: files,
    relative to the run directory, with what the ranks were doing.
    """

    exit_class: ExitClass
    cause: str
    rank: int | None
    kind: str = ""
    step: int | None = None
    host: str | None = None
    fingerprint: str | None = None
    stacks: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or _KIND_OF_CLASS[self.exit_class])
        object.__setattr__(self, "stacks", tuple(self.stacks))
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")


def record_exit(
    attempt_path: Path,
    exit_class: ExitClass,
    cause: str = "",
    rank: int | None = None,
    *,
    kind: str = "",
    step: int | None = None,
    host: str | None = None,
    fingerprint: str | None = None,
) -> bool:
    """Write ``exit.json``; any rank may, the first one stands. True if this one was it.

    The first rank that fails knows the cause; the others only see that it is gone. Where one of those was faster, a
    rank that blames itself takes its place, and a device that failed that of the errors which it caused elsewhere.
    """
    path = attempt_path / "exit.json"
    ended = Exit(exit_class, cause, rank, kind, step, host, fingerprint)
    if rank is not None and (first := read_exit(attempt_path)) is not None:
        explained = first.rank is not None and (kind != "device" or KINDS.index(first.kind) <= KINDS.index(kind))
        if first.exit_class is not ExitClass.FAULT or explained:
            return False
        settle_exit(attempt_path, ended)
        return True
    mine = attempt_path / f".exit.{uuid.uuid4().hex}.json"
    write_atomic(mine, _exit_text(ended))
    try:
        os.link(mine, path)  # unlike a rename, fails if it is there
    except FileExistsError:
        return False
    finally:
        mine.unlink(missing_ok=True)
    return True


def settle_exit(attempt_path: Path, ended: Exit) -> None:
    """Replace ``exit.json`` by what the launcher found: a rank that was killed says nothing, and the others know only
    that it is gone. For the launcher, once every rank has ended."""
    write_atomic(attempt_path / "exit.json", _exit_text(ended))


def _exit_text(ended: Exit) -> str:
    value = {
        "format": formats.stamp(EXIT_FORMAT, EXIT_VERSION),
        "class": ended.exit_class.value,
        "cause": mask(ended.cause),
        "rank": ended.rank,
        "kind": ended.kind,
        "step": ended.step,
        "host": ended.host,
        "fingerprint": mask(ended.fingerprint),
        **({"stacks": list(ended.stacks)} if ended.stacks else {}),
    }
    return json.dumps(value, indent=2) + "\n"


def read_exit(attempt_path: Path) -> Exit | None:
    """How an attempt ended; None if it did not say: it runs, or it was killed."""
    path = attempt_path / "exit.json"
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
        formats.require(value, EXIT_FORMAT, EXIT_VERSION, path)
        known = {name: value[name] for name in ("kind", "step", "host", "fingerprint", "stacks") if name in value}
        return Exit(ExitClass(value["class"]), value["cause"], value["rank"], **known)
    except Refusal:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{path} is damaged ({error}): delete it") from None


def environment() -> dict[str, Any]:
    """What this process runs on: versions, machine, and the variables in ``RECORDED``, secrets masked."""
    variables = {name: value for name, value in sorted(os.environ.items()) if _recorded(name)}
    return {
        "stoker": VERSION,
        "code_commit": code_commit(),
        "lock_sha256": lock_sha256(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "variables": mask(variables),
    }


@cache
def lock_sha256() -> str:
    """Hash of the names and versions of everything installed: equal where the same lock file was installed."""
    lines = sorted({f"{found.name.lower()}=={found.version}" for found in metadata.distributions() if found.name})
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_json(path: Path, name: str, value: Mapping[str, Any]) -> None:
    """Write an object with the stamp of the format ``name``, version 1."""
    write_atomic(path, json.dumps({"format": formats.stamp(name, 1), **value}, indent=2) + "\n")


def _recorded(name: str) -> bool:
    return any(name == entry or (entry.endswith("_") and name.startswith(entry)) for entry in RECORDED)


@cache
def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
