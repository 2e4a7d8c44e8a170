"""A run: from a configuration and a world of ranks to a finished run directory.

Order matters. Everything that can be refused is refused first, on the configuration and the files alone; then the
process group is formed; then rank 0 touches the run directory. What a step does is in ``loop.py``.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from parallel.planning.plan import ParallelPlan
from pretrain.attempt import ExitClass, Fault, record_exit
from pretrain.config import RunConfig, load
from pretrain.data import validate_data
from pretrain.diagnosis import NO_DEVICE, DeviceError, device_error, device_fingerprint, lost_peer, no_memory
from pretrain.forecast import Forecast, recorded
from pretrain.guard import require_own_rooms
from pretrain.heartbeat import Heartbeat
from pretrain.rundir import (
    ATTEMPT_VARIABLE,
    Attempt,
    Start,
    attempt_path,
    begin,
    data_changed,
    inspect,
    last_device,
    last_plan,
)
from stoker.errors import Refusal

#: How long a collective may wait, for a rank that hangs. Over gloo a rank that is gone is noticed at once.
COLLECTIVE_TIMEOUT = timedelta(seconds=600)


@dataclass(frozen=True)
class World:
    """This process among the ranks, as torchrun says; one process without it."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        def read(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        return cls(read("RANK", 0), read("WORLD_SIZE", 1), read("LOCAL_RANK", 0))


def _announce(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    return None


def main(arguments: Sequence[str]) -> int:
    """Run a configuration on this rank; returns the exit code of DESIGN section 8."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: torchrun --nproc-per-node N -m pretrain CONFIG.yaml|PRESET [section.key=value ...]")
        return 0 if arguments else ExitClass.REFUSED.code
    world, heartbeat = World.from_environment(), Heartbeat.from_environment()
    heartbeat.at("start")
    try:
        require_own_rooms()
        config = load(arguments[0], arguments[1:])
        start = validate(config, world)
        if missing := _missing_device(config, world):
            # Said by the rank that lacks it, for which the others wait. One that was there before is lost.
            lost = ATTEMPT_VARIABLE in os.environ and last_device(config.run_dir) == "cuda"
            print(missing if lost else f"refused: {missing}", file=sys.stderr, flush=True)
            return (ExitClass.FAULT if lost else ExitClass.REFUSED).code
        _validate_device(config, world)
    except Refusal as refusal:
        if world.local_rank == 0:
            print(f"refused: {refusal}", file=sys.stderr, flush=True)
        return ExitClass.REFUSED.code
    return _attempt(config, world, start, heartbeat)


def program(arguments: Sequence[str]) -> int:
    """``main`` as the last thing that a process does."""
    code = main(arguments)
    gc.freeze()  # the interpreter would look through every object that torch has made, for more than a second
    return code


def validate(config: RunConfig, world: World, announce: Callable[[str], None] = _announce) -> Start | None:
    """Everything that can be refused before ranks meet. Rank 0 also says how the run would start, and ``announce`` is
    told what the configuration left open."""
    decide(config, world.size, announce if world.rank == 0 else _silent)
    validate_data(config)
    return inspect(config) if world.rank == 0 else None


def decide(config: RunConfig, world_size: int, announce: Callable[[str], None] = _silent) -> ParallelPlan:
    """The layout of the next attempt. Under ``parallel: auto`` a run that goes on from a checkpoint keeps the one that
    it had, if ranks and batches are the same: what was measured meanwhile must not change its rounding (P5).

    Every rank asks, so that all refuse alike, and then takes rank 0's answer (``_begin``): hosts may have been measured
    apart, and a file may change between two readers.
    """
    if config.parallel == "auto" and (before := last_plan(config, world_size)) is not None:
        announce(f"parallel: auto keeps the layout that the checkpoints of {config.run_dir} were written under")
        return before
    return config.plan(world_size, announce)


def _missing_device(config: RunConfig, world: World) -> str | None:
    """Why this rank cannot compute where it should: it has no CUDA device of its own, or none at all where the run
    computed on them before. None where it can."""
    import torch

    devices, host = torch.cuda.device_count(), platform.node()
    if devices > world.local_rank:
        return None
    if devices:
        return f"rank {world.rank} {NO_DEVICE}: it is number {world.local_rank} on {host}, which has {devices}"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or last_device(config.run_dir) != "cuda":
        return None
    return (
        f"rank {world.rank} {NO_DEVICE}: {host} has none, and the run computed on them before; with the variable "
        "CUDA_VISIBLE_DEVICES set to nothing it goes on on the CPU"
    )


def _validate_device(config: RunConfig, world: World) -> None:
    """Refuse deterministic mode where it cannot be kept, and wrong kernels."""
    import torch

    from pretrain import determinism
    from pretrain.kernel_check import check_kernels

    devices = torch.cuda.device_count()
    if config.run.deterministic:
        determinism.check(has_cuda=devices > 0)
    device = torch.device("cuda", world.local_rank) if devices else torch.device("cpu")
    check_kernels(config.model_spec(), getattr(torch, config.run.dtype), device, config.run.kernels)


def _attempt(config: RunConfig, world: World, start: Start | None, heartbeat: Heartbeat) -> int:
    """One launch: form the world, train, and leave ``exit.json`` whatever happens."""
    import torch.distributed as dist

    attempt: Attempt | None = None
    number: int | None = None
    usable = True
    try:
        _join(world, config)
        attempt, begun = _begin(config, world, start)
        number = begun.attempt
        heartbeat.at("load")
        from pretrain.loop import train
        from pretrain.session import Session

        session = Session(
            config,
            world.rank,
            number,
            begun.resume_step,
            begun.data_changed,
            COLLECTIVE_TIMEOUT,
            begun.plan,
            begun.forecast,
        )
        return train(session).exit_class.code
    except Refusal as refusal:
        # Every rank refuses together: what differs between ranks is agreed on before.
        if world.local_rank == 0:
            print(f"refused: {refusal}", file=sys.stderr, flush=True)
        _leave(config, number, ExitClass.REFUSED, str(refusal))
        return ExitClass.REFUSED.code
    except BaseException as error:
        step = heartbeat.step
        usable = _device_error(error) is None  # else every further call fails, or never returns
        if lost := _lost_peer(error):
            # Not the guilty one: that one says why itself, or was killed and the launcher says it.
            cause = f"another rank is gone ({lost})"
            print(f"rank {world.rank}: {cause}", file=sys.stderr, flush=True)
            _leave(config, number, ExitClass.FAULT, cause, step=step)
            # NCCL would wait for it once more.
            usable = not (dist.is_initialized() and dist.get_backend() == "nccl")
        else:
            traceback.print_exc()
            _blame(config, number, world.rank, error, step)
        return ExitClass.FAULT.code
    finally:
        heartbeat.at("end")
        if attempt is not None:
            attempt.close()
        if dist.is_initialized() and usable:
            dist.destroy_process_group()


def _lost_peer(error: BaseException) -> str | None:
    """The line of an error that says that another rank is gone; None where it says something else."""
    return lost_peer(str(error)) if isinstance(error, RuntimeError) and _device_error(error) is None else None


def _device_error(error: BaseException) -> DeviceError | None:
    return device_error(str(error), getattr(error, "error_code", None)) if isinstance(error, RuntimeError) else None


def _join(world: World, config: RunConfig) -> None:
    """Form the process group: NCCL on CUDA, gloo on the CPU; a single process needs no rendezvous."""
    import torch
    import torch.distributed as dist

    from pretrain import determinism

    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    if config.run.deterministic:
        determinism.enter()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = COLLECTIVE_TIMEOUT
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


@dataclass(frozen=True)
class Begun:
    """What rank 0 decides for all. ``forecast``: None where nothing is known of this machine."""

    attempt: int
    resume_step: int | None
    data_changed: bool
    plan: ParallelPlan
    forecast: Forecast | None


def _begin(config: RunConfig, world: World, start: Start | None) -> tuple[Attempt | None, Begun]:
    """Rank 0 makes the attempt's directory; all ranks learn what it decided, or its refusal."""
    import torch.distributed as dist

    attempt: Attempt | None = None
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    told: list[Any] = [None]
    if world.rank == 0:
        assert start is not None
        try:
            plan = decide(config, world.size)
            expected, predictions = recorded(config, plan)
            attempt = begin(start, config, plan, predictions, device)
            told = [Begun(start.attempt, start.resume_step, data_changed(start.changes), plan, expected)]
        except Refusal as refusal:
            told = [str(refusal)]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], str):
        raise Refusal(told[0])
    return attempt, told[0]


def _blame(config: RunConfig, number: int | None, rank: int, error: BaseException, step: int | None) -> None:
    """Say in ``exit.json`` that ``rank`` raised ``error``, and what would be the same failure again."""
    kind, cause = _kind(error), f"{type(error).__name__}: {error}"
    if isinstance(error, Fault):
        cause = str(error)
        rank = rank if error.rank is None else error.rank
        step = step if error.step is None else error.step
    fingerprint: str | None = f"{kind}, rank {rank}, {type(error).__name__} at {_place(error)}, step {step}"
    if device := _device_error(error):
        fingerprint = device_fingerprint(device, rank, step)
    known = {"kind": kind, "step": step, "host": platform.node(), "fingerprint": fingerprint}
    _leave(config, number, ExitClass.FAULT, cause, rank, **known)


def _kind(error: BaseException) -> str:
    """What sort of fault an error is, of ``attempt.KINDS``."""
    import torch
    import torch.distributed as dist

    if isinstance(error, Fault):
        return error.kind
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or no_memory(str(error)):
        return "oom"
    if _device_error(error):
        return "device"
    return "store" if isinstance(error, dist.DistStoreError | dist.DistNetworkError) else "exception"


def _place(error: BaseException) -> str:
    """File and line that raised it, of Stoker's own where the error passed through one."""
    home = Path(__file__).resolve().parent.parent
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(path, line) for path, line in frames if path.is_relative_to(home) and "site-packages" not in path.parts]
    path, line = (own or frames or [(Path("unknown"), 0)])[-1]
    return f"{path.relative_to(home) if own else path}:{line}"


def _leave(config: RunConfig, number: int | None, exit_class: ExitClass, cause: str, *more: Any, **known: Any) -> None:
    if number is not None:
        record_exit(attempt_path(config.run_dir, number), exit_class, cause, *more, **known)
