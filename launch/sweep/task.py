"""One run of a sweep by its number, in a process of its own: ``python -m launch.sweep.task FOLDER [NUMBER [PARENT]]``.

Without a number it is a task of a Slurm array, whose index is the number, and keeps the run's history itself; with one,
whoever started it does. ``PARENT``: the process to end with.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from launch.local import train
from launch.sweep import ledger
from launch.sweep.history import ended, started, state
from launch.sweep.processes import end_with
from pretrain.attempt import ExitClass
from stoker.errors import Refusal

ARRAY_INDEX = "SLURM_ARRAY_TASK_ID"
#: How Slurm asks for the end, and what one that ends before it has begun says.
ENDING = (signal.SIGTERM, signal.SIGUSR1)
NOTHING_TO_SAVE = "asked to end before it had begun"


class _AskedToEnd(BaseException):
    """Slurm asked before the run's own handlers were in place."""


def main(arguments: Sequence[str]) -> int:
    try:
        return _run(*arguments)
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr, flush=True)
        return 2


def _run(folder: str, number: str | None = None, parent: str | None = None) -> int:
    if parent is not None:
        end_with(int(parent))
    sweep = ledger.read(Path(folder))
    os.environ.setdefault("OMP_NUM_THREADS", str(sweep.threads))
    if number is not None:
        return _train(sweep, sweep.trial(int(number)))
    if ARRAY_INDEX not in os.environ:
        raise Refusal(f"{ARRAY_INDEX} is not set: give the number of a run, or submit with `stoker sweep --on slurm`")
    trial = sweep.trial(int(os.environ[ARRAY_INDEX]))
    if state(sweep, trial).outcome.over:
        print(f"{sweep.run_dir(trial)} is finished: nothing to do", flush=True)
        return 0
    _when_asked(_nothing_to_save)
    try:
        started(sweep, trial)
        code = _train(sweep, trial, insist=False)
    except Refusal as refusal:
        ended(sweep, trial, ExitClass.REFUSED.code, str(refusal))
        raise
    except _AskedToEnd:
        code = ExitClass.PREEMPTED.code
        ended(sweep, trial, code, NOTHING_TO_SAVE)
    else:
        _when_asked(signal.SIG_IGN)
        ended(sweep, trial, code)
    return code


def _when_asked(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in ENDING:
        signal.signal(number, handler)


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    _when_asked(signal.SIG_IGN)
    raise _AskedToEnd


def _train(sweep: ledger.Ledger, trial: ledger.Trial, insist: bool = True) -> int:
    source, *overrides = sweep.arguments(trial)
    return train(source, overrides, sweep.definition.ranks, insist=insist)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
