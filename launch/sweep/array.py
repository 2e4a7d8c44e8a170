"""A sweep as an array job of Slurm: a task for each run that is left. No torch."""

from __future__ import annotations

import sys

from launch.launching.slurm import submit_array
from launch.sweep.history import Outcome, state
from launch.sweep.ledger import Ledger
from stoker.errors import Refusal


def submit(ledger: Ledger, jobs: int | None = None) -> str:
    """Submit what is left, ``jobs`` at a time (None: all at once), and say what was submitted. A task is queued again
    where its time is up; a run that broke goes on when the command is given again."""
    root = ledger.root
    if ledger.definition.stop is not None:
        raise Refusal(
            "stop: the rule is decided by one process that sees all runs, and the tasks of an array have none: leave "
            "it out, or use --on local or --on ray"
        )
    states = [(trial, state(ledger, trial).outcome) for trial in ledger.active]
    left = [t.number for t, outcome in states if not outcome.over and outcome is not Outcome.RUNNING]
    if not left:
        return f"{root}: nothing is left to run"
    section = ledger.config(ledger.trial(left[0])).launch
    cores, gpus = ledger.definition.ranks * ledger.threads, ledger.definition.gpus
    argv = [sys.executable, "-m", "launch.sweep.task", str(root.absolute())]
    job = submit_array(argv, root.absolute(), left, jobs or len(left), section, cores, gpus)
    return f"job {job}: {len(left)} runs of {root}, {jobs or len(left)} at a time; `stoker report {root}` shows them"
