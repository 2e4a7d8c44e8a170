"""What a scheduler starts once on every node: ``python -m launch.launching.node LAUNCH.json``.

Which node of the job is this? Are all fit to begin (preflight)? Then the agent runs the node's ranks. The exit code is
the run's (DESIGN section 8); asked to end (SIGTERM, SIGUSR1) before ranks have begun, it is 4: nothing was lost.

Started again (a pod that was moved, or lost), it joins its launch where that runs, returns its code where that has
ended, and begins the next one where all have saved to be continued. A node that takes no part leaves; one that would
then be started again, or count against the others, waits for their end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.launching.job import Job
    from launch.launching.where import Where
    from launch.supervise.agent import Agent
    from launch.supervise.node import Node
    from pretrain.config import RunConfig

#: Exit codes of DESIGN section 8.
REFUSED, SAVED = 2, 4
#: Seconds for all pods of a job to be there: some still pull the image.
PULLING_S = 900.0
#: Seconds between two looks of a node that takes no part at whether the launch has ended.
LOOK_S = 5.0
#: A scheduler's ways to ask for the end. SIGUSR1 would end a process that does not know it.
ENDING = (signal.SIGTERM, signal.SIGUSR1)


def main(arguments: Sequence[str]) -> int:
    """Run this node's part of a job to its end."""
    for number in ENDING:  # before the imports, which take a second
        signal.signal(number, _nothing_to_save)
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python -m launch.launching.node LAUNCH.json (written by `stoker launch`)", file=sys.stderr)
        return 0 if "-h" in arguments or "--help" in arguments else REFUSED
    from stoker.errors import Refusal

    try:
        return run(arguments[0])
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr, flush=True)
        return REFUSED


def run(path: str) -> int:
    """As ``main``; raises Refusal."""
    from launch.launching.job import Job
    from launch.launching.values import SECRETS, overrides
    from launch.launching.where import where
    from launch.supervise import outcome
    from pretrain.config import load
    from pretrain.guard import require_own_rooms

    require_own_rooms()
    job = Job.read(path)
    here = where(job, os.environ)
    _enter(job)
    arguments = [job.config, *overrides(os.environ.get(SECRETS))]
    config = load(arguments[0], arguments[1:])
    for name, value in job.environment.items():
        os.environ.setdefault(name, value)  # what the site has set for its nodes stands
    while True:
        launch = replace(here, start=outcome.generation(config.run_dir, here.start)) if here.comes_back else here
        if (code := outcome.ended(config.run_dir, launch.start)) is not None:
            print(f"{here.host}: launch {launch.start} has ended with {code}", file=sys.stderr, flush=True)
            return code
        if (good := _fit(config, job, launch)) is not None:
            return _supervise(config, arguments, job, launch, good)
        if not here.comes_back:
            return 0
        while outcome.ended(config.run_dir, launch.start) is None:
            time.sleep(LOOK_S)


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    print(f"{signal.Signals(number).name} before ranks have begun: nothing is lost", file=sys.stderr, flush=True)
    raise SystemExit(SAVED)


def _enter(job: Job) -> None:
    """Go where the configuration's relative paths begin."""
    from stoker.errors import Refusal

    if job.directory is None:
        return
    try:
        os.chdir(job.directory)
    except OSError as error:
        raise Refusal(
            f"{job.directory}, where `stoker launch` was called, is not on this node ({error.strerror}): call it on a "
            "file system that all nodes share, and in a container make it one of launch.mounts"
        ) from None


def _fit(config: RunConfig, job: Job, here: Where) -> tuple[str, ...] | None:
    """Hosts that passed the preflight, in job order; the same on all of them. None where the others go on without this
    one; refuses where they cannot."""
    from launch.preflight.run import preflight
    from launch.preflight.shared import Launch, goes_on
    from stoker.errors import Refusal

    launch = Launch(
        id=here.start,
        node=here.host,
        nodes=here.hosts,
        needed=job.nodes,
        port=job.port,
        segment=None if job.segment is None else job.segment + job.segment_spares,
        share_hosts=here.one_machine,
        timeout_s=PULLING_S if here.comes_back else Launch.timeout_s,  # pods start apart
        quiet_s=PULLING_S if here.comes_back else Launch.quiet_s,
    )
    try:
        report = preflight(config, job.ranks_per_node, launch if job.all_nodes > 1 else None)
    except Refusal as refusal:
        if not (here.comes_back and goes_on(here.start, config.run_dir)):
            raise
        _say_aside(here, str(refusal))  # and no more: its exit code would end the others
        return None
    verdict = report.verdict
    warnings = [str(finding) for finding in report.findings if finding.status == "warn"]
    if verdict is not None and here.index == 0:
        warnings += verdict.warnings
    for warning in warnings:
        print(f"{here.host}: {warning}", file=sys.stderr, flush=True)
    if report.aside is not None:
        _say_aside(here, report.aside)
        return None
    report.refuse()
    return here.hosts if verdict is None else verdict.good


def _say_aside(here: Where, reason: str) -> None:
    waits = ", and waits for the end of the launch" if here.comes_back else ""
    print(f"{here.host} takes no part{waits}: {reason}", file=sys.stderr, flush=True)


def _supervise(config: RunConfig, arguments: Sequence[str], job: Job, here: Where, good: Sequence[str]) -> int:
    """Run the ranks of this node until the run ends."""
    from launch.machine import environment_for
    from launch.supervise.agent import Agent, Work

    work = Work(
        run_dir=config.run_dir,
        arguments=tuple(arguments),
        ranks=job.ranks_per_node,
        environment=environment_for(config, job.ranks_per_node),
        launch=config.launch,
        prefixes=_prefixes(job),
    )
    agent = Agent(work, _node(config, job, here, good))
    _pass_on(agent)
    return agent.run()


def _pass_on(agent: Agent) -> None:
    """Tell the agent once to save and end, however often the scheduler asks: its notice is followed by SIGTERM at the
    time limit, and a second request would end the ranks in the middle of saving. What takes too long is ended by
    launch.grace_s, and by the scheduler itself."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            agent.ask_to_end()

    for number in (*ENDING, signal.SIGINT):
        signal.signal(number, handle)


def _node(config: RunConfig, job: Job, here: Where, good: Sequence[str]) -> Node:
    """This node among those of the job."""
    if job.all_nodes == 1:
        from launch.local import listeners
        from launch.supervise.node import Alone

        return Alone(config.run_dir, job.ranks_per_node, config.launch.max_restarts, listeners(config))
    from launch.supervise.nodes import several

    return several(config, job, here, good)


def _prefixes(job: Job) -> tuple[tuple[str, ...], ...]:
    """What goes before the command of each rank, where this node has numactl."""
    if job.ranks_per_numa is not None and shutil.which("numactl") is None:
        print(
            "numactl is not on this node: ranks are not bound to the processor beside their GPU, and copies to the "
            "device may cross to the other one; install it",
            file=sys.stderr,
            flush=True,
        )
        return ()
    return tuple(tuple(job.bind(local_rank)) for local_rank in range(job.ranks_per_node))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
