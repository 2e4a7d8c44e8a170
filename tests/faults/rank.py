"""A rank for the fault matrix: ``launch.supervise.worker`` that keeps a history, and to which things happen.

``FAULT_FOLDER`` names the folder of a run's history. There it writes, for each rank, a line a step (``steps_R.jsonl``:
which windows it read, and the hash of its state after it), its process number as it becomes a rank, and that it has
done a step. From there it reads ``faults.json``, what is to happen to which rank at which phase of which step, and
``pace``, seconds that recording takes longer in every step, so that a fault can be prepared meanwhile.

``FAULT_BATCHES`` names batches, counted as the data order has them, that are one token again and again, whenever and by
whatever rank they are read; ``FAULT_LR`` the step from which on the learning rate is ``LR_TIMES`` what it should be.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.launch.supervise import faulty

FOLDER, BATCHES, LR = "FAULT_FOLDER", "FAULT_BATCHES", "FAULT_LR"
LR_TIMES = 1000.0
HERE = "tests.faults.rank"
#: Faults of numbers, which need the trainer; everything else happens as a phase begins.
NUMBERS = ("nan", "flip", "slow")
CHUNK = 2**24


class History:
    """What this process writes down, and what happens to it."""

    def __init__(self) -> None:
        self.folder = Path(os.environ[FOLDER])
        self.rank, self.attempt = int(os.environ["RANK"]), int(os.environ["STOKER_ATTEMPT"])
        path = self.folder / f".pid_{self.rank}"
        path.write_text(str(os.getpid()))
        path.rename(self.folder / f"pid_{self.attempt}_{self.rank}")

    def pace(self) -> None:
        """Take as long as ``pace`` says now."""
        path, began = self.folder / "pace", time.monotonic()
        while path.exists() and time.monotonic() - began < float(path.read_text()):
            time.sleep(0.01)

    def due(self, phase: str, step: int | None) -> list[dict[str, Any]]:
        """The faults of this phase of this step, each of which now counts as having happened."""
        path = self.folder / "faults.json"
        found = []
        for fault in json.loads(path.read_text()) if path.exists() else ():
            here = (fault["rank"], fault["phase"], fault["step"]) == (self.rank, phase, step)
            if here and self._claim(fault):
                found.append(fault)
        return found

    def _claim(self, fault: dict[str, Any]) -> bool:
        for time_of_many in range(fault["times"]):
            try:
                (self.folder / f"struck_{fault['number']}_{time_of_many}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def write(self, step: int, samples: list[int], state: str, verdict: str) -> None:
        line = {"attempt": self.attempt, "step": step, "samples": samples, "state": state, "verdict": verdict}
        with open(self.folder / f"steps_{self.rank}.jsonl", "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
        (self.folder / f"trained_{self.attempt}_{self.rank}").touch()


def inject() -> None:
    """Put the history into the modules of a run, before the process becomes a rank."""
    import pretrain.run
    from pretrain import loop
    from pretrain.feed import Feed
    from pretrain.heartbeat import Heartbeat
    from pretrain.session import Session

    whole_main, whole_step, whole_at = pretrain.run.main, loop.train_step, Heartbeat.at
    whole_read, whole_lr = Feed.read, Session.lr
    histories: list[History] = []

    def main(arguments: Any) -> int:
        histories.append(History())
        return whole_main(arguments)

    def at(heartbeat: Heartbeat, phase: str, step: int | None = None) -> None:
        whole_at(heartbeat, phase, step)
        for history in histories:
            if phase == "record":
                history.pace()
            for fault in history.due(phase, step):
                strike(fault)

    def train_step(trainer: Any, step: int, batch: Any, *rest: Any, **more: Any) -> Any:
        (history,) = histories
        spoilt: Any = nullcontext()
        for fault in history.due("numbers", step):
            spoilt = spoil(trainer, fault["what"], history.rank)
        with spoilt:
            report, verdict = whole_step(trainer, step, batch, *rest, **more)
        history.write(step, [int(number) for number in batch.sample_id], trainer.state_hash(), verdict)
        return report, verdict

    def read(feed: Feed, *arguments: Any) -> Any:
        plan, batch = whole_read(feed, *arguments)
        if int(plan.sample_id[0]) // plan.global_batch in batches:
            batch = replace(batch, tokens=batch.tokens * 0 + 1, targets=batch.targets * 0 + 1)
        return plan, batch

    def lr(session: Session, step: int) -> float:
        return whole_lr(session, step) * (LR_TIMES if step >= wrong_from else 1.0)

    batches = [int(number) for number in os.environ.get(BATCHES, "").split(",") if number]
    wrong_from = float(os.environ.get(LR, "inf"))
    pretrain.run.main, loop.train_step = main, train_step
    Feed.read, Session.lr = read, lr  # type: ignore[method-assign]
    Heartbeat.at = at  # type: ignore[method-assign]


def strike(fault: dict[str, Any]) -> None:
    """Something happens to this process."""
    what = fault["what"]
    if what == "hold":  # it is waited for, and something done to it from outside
        time.sleep(fault["seconds"])
    elif what == "eat memory":
        eaten = []
        while True:
            eaten.append(mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
    elif what == "clock":
        ctypes.CDLL(None).shift_clock(ctypes.c_long(int(fault["seconds"])))
    else:
        faulty.strike(what)


def spoil(trainer: Any, what: str, rank: int) -> Any:
    """A wrong number in this rank's step, or (for good) three times its work."""
    from tests.pretrain.guards.faults import fault, flip, to_nan

    if what == "nan":
        return fault(trainer, "gradient", to_nan, rank)
    if what == "flip":
        return fault(trainer, "weight", flip(19), rank)
    if what != "slow":
        raise ValueError(what)
    run = trainer.pipeline.run

    def three_times(*arguments: Any, **options: Any) -> Any:
        before = time.process_time()
        result = run(*arguments, **options)
        spent = time.process_time() - before
        while time.process_time() - before < 3 * spent:
            pass
        return result

    trainer.pipeline.run = three_times
    return nullcontext()


if __name__ == "__main__":
    from launch.supervise import worker

    whole = worker.prepare
    worker.prepare = lambda arguments: (whole(arguments), inject())  # type: ignore[func-returns-value]
    sys.exit(worker.main(sys.argv[1:]))
