"""What a scheduler starts once on every node: ``python -m launch.launching.node LAUNCH.json``.

Which node of the job is this? Are all fit to begin (preflight)? Then the agent runs the node's ranks. The exit code is
the run's (DESIGN section 8); asked to end (SIGTERM, SIGUSR1) before ranks have begun, it is 4: nothing was lost.

Started again (a pod that was moved, or lost), it joins its launch where that runs, returns its code where that has
ended, and begins the next one where all have saved to be continued. A node that takes no part leaves; one that would
then be started again, or count against the others, waits for their end: so does one that came to an end which is not
the launch's, as it cannot reach the others. Where they count on it, it tries once a minute to join them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.launching.job import Job
    from launch.launching.where import Where
    from launch.supervise.node import Node
    from pretrain.config import RunConfig

#: Exit codes of DESIGN section 8.
REFUSED, SAVED = 2, 4
#: Seconds between two looks of a node that takes no part at whether the launch has ended, and until it tries again.
LOOK_S, AGAIN_S = 5.0, 60.0
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
    from stoker.errors import Refusal

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
        try:
            good = _fit(config, job, launch)
            code = None if good is None else _supervise(config, arguments, job, launch, good)
        except Exception as error:
            if not (here.comes_back and _led(config.run_dir, launch.start)):
                raise
            _say_aside(here, str(error) if isinstance(error, Refusal) else traceback.format_exc())
            code = None
        if code is not None:
            return code
        if not here.comes_back:
            return 0
        _wait(config.run_dir, launch)


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    print(f"{signal.Signals(number).name} before ranks have begun: nothing is lost", file=sys.stderr, flush=True)
    raise SystemExit(SAVED)


def _led(run_dir: Path, launch: str) -> bool:
    """Whether a node has led the launch, as far as can be told: it says where ranks stand, once all have their verdict.
    Who began after that can end nothing but itself."""
    from launch.preflight.shared import FOLDER, VERDICT
    from launch.supervise.journal import RANKS

    try:
        return (run_dir / RANKS).stat().st_mtime >= (run_dir / FOLDER / launch / VERDICT).stat().st_mtime
    except FileNotFoundError:
        return False
    except OSError:  # the path is lost, which was there at the verdict
        return True


def _wait(run_dir: Path, here: Where) -> None:
    """For the end of the launch; where it counts on this node, until that is to try again."""
    from launch.preflight.shared import goes_on
    from launch.supervise import outcome

    looks = 0
    while outcome.ended(run_dir, here.start) is None:
        if looks * LOOK_S >= AGAIN_S and goes_on(here.start, run_dir, here.host):
            return
        time.sleep(LOOK_S)
        looks += 1


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
    from launch.launching.where import PULLING_S
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


def _supervise(config: RunConfig, arguments: Sequence[str], job: Job, here: Where, good: Sequence[str]) -> int | None:
    """Run the ranks of this node until the run ends. None where only this node's part in it has, and it may have
    another one."""
    from launch.machine import environment_for
    from launch.supervise.agent import Agent, Work, asked_to_end
    from launch.supervise.nodes import Several

    work = Work(
        run_dir=config.run_dir,
        arguments=tuple(arguments),
        ranks=job.ranks_per_node,
        environment=environment_for(config, job.ranks_per_node),
        launch=config.launch,
        prefixes=_prefixes(job),
    )
    node = _node(config, job, here, good)
    agent = Agent(work, node)
    # Once, however often the scheduler asks: its notice is followed by SIGTERM at the time limit, and a second request
    # would end the ranks in the middle of saving. launch.grace_s ends what takes too long, and the scheduler itself.
    with asked_to_end(agent, insist=False):
        code = agent.run()
    if not (here.comes_back and isinstance(node, Several) and node.alone):
        return code
    if agent.asked:
        return SAVED  # it is started again, and joins the others where they are
    if not _led(config.run_dir, here.start):
        return code
    _say_aside(here, agent.decision.text)
    return None


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
