"""What must hold after any fault, each as a list of what does not: O1 to O5 of the fault matrix.

O1  The curve and the state of every rank after every step are, to the last bit, those of the run without a fault.
O2  No committed checkpoint is lost or altered, and all of them are whole.
O3  No more steps are done again than lie between two checkpoints, and each window is consumed once in what stands.
O4  Cause, kind and rank are named, in exit.json and in the journal.
O5  No process, shared memory, port or supervisor's lock is left.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.supervise import journal
from launch.supervise.journal import Journal
from pretrain import events
from pretrain.attempt import read_exit
from pretrain.checkpoint import folders
from pretrain.checkpoint.store import CheckpointStore
from pretrain.events import deterministic
from pretrain.rundir import CHECKPOINTS, attempt_path
from stoker.errors import Refusal
from tests.faults.box import Box
from tests.faults.runs import CHECKPOINT_EVERY, Launch, Run

NAMES = ("O1", "O2", "O3", "O4", "O5")
#: Seconds for the kernel to end what a killed process has left to it.
ENDING_S = 5.0


def o1_same_curve(run: Run, whole: Run) -> list[str]:
    """``whole``: the undisturbed run, at least as many steps long."""
    wrong = []
    curve, expected = events.read(run.root), events.read(whole.root)[: len(events.read(run.root))]
    for mine, theirs in zip(curve, expected):
        if _numbers(mine) != _numbers(theirs):
            wrong.append(f"step {mine.step}: {_numbers(mine)} and not {_numbers(theirs)}")
            break
    if len(curve) != len(expected):
        wrong.append(f"{len(curve)} steps, and the undisturbed run has {len(expected)}")
    for rank in range(run.ranks):
        mine_by_step, their_by_step = _standing(run, rank), _standing(whole, rank)
        differ = [event.step for event in curve if _state(mine_by_step, event) != _state(their_by_step, event)]
        if differ:
            wrong.append(f"the state of rank {rank} after step {differ[0]} is another, and of {len(differ)} steps")
    return wrong


def _numbers(event: events.StepEvent) -> dict[str, Any]:
    """What the step came to. That a guard had it computed twice, and for which rank, is said beside it (``aux``)."""
    found = deterministic(event)
    return found | {"aux": {name: value for name, value in found["aux"].items() if not name.startswith("recomputed")}}


def _standing(run: Run, rank: int) -> dict[int, dict[str, Any]]:
    """What a rank wrote of each step in the attempt whose event of it stands."""
    stands = {event.step: event.attempt for event in events.read(run.root)}
    return {line["step"]: line for line in run.history(rank) if stands.get(line["step"]) == line["attempt"]}


def _state(by_step: dict[int, dict[str, Any]], event: events.StepEvent) -> str:
    return by_step[event.step]["state"] if event.step in by_step else f"unknown after step {event.step}"


def checkpoint_hashes(root: Path, known: Container[str] = ()) -> dict[str, str]:
    """The content of every committed checkpoint that is not yet ``known``, by the name of its folder."""
    found = {}
    for step in folders.committed(root / CHECKPOINTS):
        folder, digest = folders.path(root / CHECKPOINTS, step), hashlib.sha256()
        if folder.name in known:
            continue
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
        found[folder.name] = digest.hexdigest()
    return found


def o2_checkpoints_stand(run: Run) -> list[str]:
    """Those that were committed when faults struck are unaltered; all are whole, byte by byte."""
    now = checkpoint_hashes(run.root)
    wrong = [f"{name} was committed and is gone" for name in run.remembered if name not in now]
    wrong += [f"{name} was altered" for name, content in run.remembered.items() if now.get(name, content) != content]
    store = CheckpointStore(run.root / CHECKPOINTS)
    for step in folders.found(store.root):
        wrong += [f"step {step}: {damage}" for damage in store.verify(step)]
    committed = folders.committed(store.root)
    if committed and store.latest() != committed[-1]:
        wrong.append(f"latest is step {store.latest()}, and step {committed[-1]} is committed")
    return wrong


def o3_nothing_twice(run: Run, whole: Run) -> list[str]:
    wrong = []
    by_attempt: dict[int, list[int]] = {}
    for line in run.lines():
        by_attempt.setdefault(line["attempt"], []).append(line["step"])
    done = -1
    for attempt, steps in sorted(by_attempt.items()):
        if (again := done + 1 - steps[0]) > CHECKPOINT_EVERY:
            wrong.append(f"attempt {attempt} did {again} steps again, and checkpoints are {CHECKPOINT_EVERY} apart")
        done = max(done, steps[-1])
    consumed, expected = _consumed(run), _consumed(whole, set(_standing(run, 0)))
    twice = [window for window, times in consumed.items() if times > 1]
    if twice:
        wrong.append(f"{len(twice)} windows were consumed more than once, such as {twice[0]}")
    if consumed != expected:
        lost = expected - consumed
        wrong.append(f"{sum(lost.values())} windows of the undisturbed run were not consumed")
    return wrong


def _consumed(run: Run, steps: set[int] | None = None) -> Counter[int]:
    """How often each window was read, in the steps that stand (of ``steps``)."""
    lines = [line for rank in range(run.ranks) for line in _standing(run, rank).values()]
    return Counter(window for line in lines if steps is None or line["step"] in steps for window in line["samples"])


def o4_named(run: Run) -> list[str]:
    wrong = []
    lines = journal.read(run.root)
    for strike in run.strikes:
        what = f"{strike.fault} (attempt {strike.attempt})"
        ended = read_exit(attempt_path(run.root, strike.attempt))
        if ended is None:
            wrong.append(f"{what}: no exit.json")
            continue
        if ended.kind not in strike.kinds or not ended.cause:
            wrong.append(f"{what}: exit.json says {ended.kind} ({ended.cause})")
        if strike.rank is not None and ended.rank != strike.rank:
            wrong.append(f"{what}: exit.json blames rank {ended.rank} and not {strike.rank}: {ended.cause}")
        if strike.host is not None and ended.host != strike.host:
            wrong.append(f"{what}: exit.json names node {ended.host} and not {strike.host}")
        said = [line for line in lines if line["event"] == "fault" and line["attempt"] == strike.attempt]
        known = [line for line in said if line["kind"] in strike.kinds and line["rank"] == ended.rank]
        if not known and ended.exit_class.value == "fault":
            wrong.append(f"{what}: the journal says {[(line['kind'], line['rank']) for line in said]}")
    return wrong


def o5_nothing_left(run: Run) -> list[str]:
    """After the run has ended. Shared memory and ports are looked at where it ran in a box of its own."""
    until = time.monotonic() + ENDING_S
    while (wrong := _left(run)) and time.monotonic() < until:
        time.sleep(0.05)
    try:
        Journal(run.root).close()
    except Refusal as refusal:
        wrong.append(str(refusal))
    return wrong


def _left(run: Run) -> list[str]:
    """A process that is about to end may have no environment any more by which it is found, and its ports still."""
    wrong = [f"process {process.pid} is left" for process in run.family() if _alive(process)]
    return wrong + [f"{box.name}: {thing} is left" for box in _boxes(run) for thing in box.left()]


def _boxes(run: Run) -> Sequence[Box]:
    if isinstance(run, Launch):
        return [] if run.network is None else run.network.boxes
    return [] if run.box is None else [run.box]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check(run: Run, whole: Run) -> dict[str, list[str]]:
    """All five, after the run has ended."""
    return {
        "O1": o1_same_curve(run, whole),
        "O2": o2_checkpoints_stand(run),
        "O3": o3_nothing_twice(run, whole),
        "O4": o4_named(run),
        "O5": o5_nothing_left(run),
    }
