"""``stoker sweep``: from the file to finished runs, on this machine, a Slurm array or a Ray cluster. No torch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from launch.machine import KEEP_MEMORY, cores, cuda_devices
from launch.sweep import definition, planning
from launch.sweep.forks import TRAINER, ForkSlots
from launch.sweep.history import state
from launch.sweep.ledger import Ledger
from launch.sweep.scheduler import Scheduler, Summary
from launch.sweep.slots import ProcessSlots, Slots
from stoker.errors import Refusal

LOCK = ".lock"
Where = Literal["local", "slurm", "ray"]


def sweep(
    path: Path,
    jobs: int | None = None,
    where: Where = "local",
    *,
    fresh: bool = False,
    trainer: str = TRAINER,
    announce: Callable[[str], None] = print,
) -> Summary | str:
    """Run what a sweep's file asks for and is not finished, ``jobs`` at a time. A Slurm array is submitted and not
    waited for: its job id.

    ``fresh``: a process for each run, not a fork of one that has imported torch. ``trainer``: what a fork calls, for
    those who run something else than ``pretrain`` under the same scheduler.
    """
    ledger = prepare(path, jobs)
    if where == "slurm":
        from launch.sweep.array import submit

        with _held(ledger):
            return submit(ledger, jobs)
    with _held(ledger):
        slots = open_slots(ledger, jobs, where, fresh, trainer, announce)
        try:
            return Scheduler(ledger, slots, announce).run()
        finally:
            slots.close()


def prepare(path: Path, jobs: int | None = None) -> Ledger:
    """The checked ledger of a sweep's file; nothing is written. ``jobs`` decides the threads of a new sweep's ranks."""
    found = definition.load(path)
    jobs = jobs or default_jobs(found.ranks)
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdigit() and int(given) else max(1, cores() // (jobs * found.ranks))
    return planning.plan(found, threads)


def default_jobs(ranks: int) -> int:
    """As many runs as devices, or cores, allow."""
    return max(1, (cuda_devices() or cores()) // ranks)


def open_slots(
    ledger: Ledger,
    jobs: int | None = None,
    where: Where = "local",
    fresh: bool = False,
    trainer: str = TRAINER,
    announce: Callable[[str], None] = print,
) -> Slots:
    """Where the runs are executed. Forks where a run is one process without a GPU: CUDA does not survive a fork."""
    if where == "ray":
        from launch.sweep.on_ray import RaySlots

        return RaySlots(ledger, jobs)
    ranks, devices = ledger.definition.ranks, cuda_devices()
    jobs = jobs or default_jobs(ranks)
    environment = {"OMP_NUM_THREADS": str(ledger.threads)}
    if not devices and ranks == 1 and not fresh:
        kept = {name: value for name, value in KEEP_MEMORY.items() if name not in os.environ}
        return ForkSlots(ledger, jobs, environment | kept, trainer, announce)
    if trainer != TRAINER:
        raise Refusal(f"trainer={trainer} is called in forks alone: it needs one rank, and no CUDA device")
    if not devices:
        return ProcessSlots(ledger, jobs, environment)
    if jobs * ranks > devices:
        raise Refusal(
            f"{jobs} runs of {ranks} ranks need {jobs * ranks} devices, and this machine has {devices}: "
            f"--jobs {max(1, devices // ranks)}, or fewer ranks"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [n.strip() for n in visible.split(",") if n.strip()] if visible else [str(n) for n in range(devices)]
    return ProcessSlots(ledger, jobs, {}, [names[slot * ranks : (slot + 1) * ranks] for slot in range(jobs)])


@contextmanager
def _held(ledger: Ledger) -> Iterator[None]:
    """The sweep's folder, written, for this process alone."""
    try:
        ledger.root.mkdir(parents=True, exist_ok=True)
        held = open(ledger.root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise Refusal(f"{ledger.root} cannot be written ({error.strerror}): choose another dir") from None
    with held as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Refusal(f"{ledger.root} is run by {file.read()} already: wait for it, or end it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        ledger.write()
        yield


def listed(ledger: Ledger) -> list[tuple[int, str, str]]:
    """Number, overrides and state of every run that the file asks for."""
    return [(t.number, definition.words(t.overrides), state(ledger, t).outcome.value) for t in ledger.active]
