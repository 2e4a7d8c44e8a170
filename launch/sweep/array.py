"""A sweep as an array job of Slurm: a task for each run that is left. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.launching.slurm import array_tasks, stop_arrays, submit_array
from launch.sweep.history import Outcome, state
from launch.sweep.ledger import Ledger
from pretrain.config_sections import LaunchSection
from stoker.errors import Refusal

#: Of the section, what Slurm is told once for all tasks.
SHARED = ("partition", "account", "time_limit_min", "signal_s")


def submit(ledger: Ledger, jobs: int | None = None) -> str:
    """Submit what is left and not in the queue already, ``jobs`` at a time (None: all at once), and say what was
    submitted. A task is queued again where its time is up; a run that broke goes on when the command is given again."""
    root = ledger.root
    if ledger.definition.stop is not None:
        raise Refusal(
            "stop: the rule is decided by one process that sees all runs, and the tasks of an array have none: leave "
            "it out, or use --on local or --on ray"
        )
    states = [(trial, state(ledger, trial).outcome) for trial in ledger.active]
    left = [t.number for t, outcome in states if not outcome.over and outcome is not Outcome.RUNNING]
    queued = {task.index for task in array_tasks(root.absolute())} & {*left}
    left = [number for number in left if number not in queued]
    if not left:
        already = f"{len(queued)} runs are in Slurm's queue already, and " if queued else ""
        return f"{root}: {already}nothing is left to run"
    section = _section(ledger, left)
    cores, gpus = ledger.definition.ranks * ledger.threads, ledger.definition.gpus
    argv = [sys.executable, "-m", "launch.sweep.task", str(root.absolute())]
    at_once = min(jobs or len(left), len(left))
    job = submit_array(argv, root.absolute(), left, at_once, section, cores, gpus)
    return f"job {job}: {len(left)} runs of {root}, {at_once} at a time; `stoker report {root}` shows them"


def _section(ledger: Ledger, numbers: Sequence[int]) -> LaunchSection:
    """What all tasks of the array share; refuses where runs ask for what tasks cannot have, or have only together."""
    sections = {number: ledger.config(ledger.trial(number)).launch for number in numbers}
    first = sections[numbers[0]]
    for number, section in sections.items():
        if section.container is not None:
            raise Refusal(
                f"run {number}: launch.container: the tasks of an array run as this command does, in no image: set it "
                "to null"
            )
        for key in SHARED:
            if getattr(section, key) != getattr(first, key):
                raise Refusal(
                    f"launch.{key} is {getattr(first, key)} in run {numbers[0]} and {getattr(section, key)} in run "
                    f"{number}: an array has one for all its tasks; make them two sweeps"
                )
    return first


def stop(root: Path) -> str:
    """Ask the runs of a sweep's arrays to save and end, take those that wait out of the queue, and say how many."""
    root = root.absolute()
    if not any(root.glob("array-*.json")):
        raise Refusal(
            f"{root} has no array job: what runs on this machine or on Ray saves at Ctrl-C, or where the process that "
            f"{root}/.lock names gets SIGTERM"
        )
    tasks = stop_arrays(root)
    if not tasks:
        return f"{root}: none of its runs is in Slurm's queue"
    waiting = sum(task.waits for task in tasks)
    return (
        f"{root}: {waiting} runs were taken out of Slurm's queue, {len(tasks) - waiting} are asked to save; "
        "`stoker sweep --on slurm` goes on with them"
    )
