"""``stoker train``: a run on this machine. Validates here, so that a refusal is one line; then torchrun takes over."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launch.machine import choose_ranks, environment_for
from launch.torchrun import Failure, Torchrun, command, command_line
from pretrain.attempt import Exit, ExitClass, amend_exit, read_exit, record_exit
from pretrain.config import load
from pretrain.run import World, validate
from pretrain.rundir import attempt_path, attempts
from stoker.files import write_atomic

TORCHRUN_LOG = "torchrun.log"


def train(
    source: str,
    overrides: Sequence[str] = (),
    ranks: int | None = None,
    max_restarts: int = 0,
    watch: Callable[[Torchrun], None] | None = None,
) -> int:
    """Run a configuration on ``ranks`` processes of this machine (None: as many as suit it); returns the exit code of
    DESIGN section 8. ``watch`` is called once they have been started.

    SIGINT and SIGTERM ask the ranks for an urgent checkpoint; a second one ends them at once.
    """
    config = load(source, overrides)
    ranks = choose_ranks(config) if ranks is None else ranks
    first = validate(config, World(rank=0, size=ranks, local_rank=0), announce=_silent)
    assert first is not None
    environment = environment_for(config, ranks)
    arguments = [source, *overrides]
    print(f"$ {command_line(command(arguments, ranks, max_restarts), environment)}", flush=True)
    with Torchrun(arguments, ranks, environment, max_restarts) as torchrun, _asked_to_end(torchrun):
        if watch is not None:
            watch(torchrun)
        code = torchrun.wait()
    return conclude(config.run_dir, first.attempt, code, torchrun)


def conclude(run_dir: Path, first_attempt: int, code: int, torchrun: Torchrun) -> int:
    """The exit code of the command, and one line on stderr that says why, where a rank has not said it already.

    torchrun turns every code of a rank into 1; how the attempt ended stands in its ``exit.json``.
    """
    number = max(attempts(run_dir), default=0)
    path = attempt_path(run_dir, number) if number >= first_attempt else None
    ended = read_exit(path) if path else None
    if path and torchrun.report:
        write_atomic(path / TORCHRUN_LOG, torchrun.report)
    if path and torchrun.failure and torchrun.failure.killed:
        _name_killed(path, ended, torchrun.failure)
    if code == 0:
        return ExitClass.DONE.code
    outcome, reason = _explain(ended, torchrun)
    if outcome is not ExitClass.REFUSED:  # rank 0 has said it
        where = f" ({path / TORCHRUN_LOG})" if path and outcome is ExitClass.FAULT else ""
        print(f"{outcome.value}: {' '.join(reason.split())}{where}", file=sys.stderr, flush=True)
    return outcome.code


def _name_killed(path: Path, ended: Exit | None, killed: Failure) -> None:
    """Complete ``exit.json`` where no rank could say whose fault the end was."""
    if ended is None:
        record_exit(path, ExitClass.FAULT, str(killed), killed.rank)
    elif ended.exit_class is ExitClass.FAULT and ended.rank is None:
        amend_exit(path, str(killed), killed.rank)


def _explain(ended: Exit | None, torchrun: Torchrun) -> tuple[ExitClass, str]:
    failed = torchrun.failure
    killed = failed is not None and failed.killed
    if ended is not None and ended.exit_class not in (ExitClass.FAULT, ExitClass.DONE):
        return ended.exit_class, ended.cause
    if ended is None and failed is not None and failed.exit_code == ExitClass.REFUSED.code:
        return ExitClass.REFUSED, ""
    if ended is not None and ended.exit_class is ExitClass.FAULT and not killed:
        return ExitClass.FAULT, ended.cause if ended.rank is None else f"rank {ended.rank}: {ended.cause}"
    # Of a rank that was killed, the others know no more than that it is gone.
    return ExitClass.FAULT, f"{failed or 'torchrun ended'}; the same command goes on from the newest checkpoint"


@contextmanager
def _asked_to_end(torchrun: Torchrun) -> Iterator[None]:
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            torchrun.kill()
            return
        asked = True
        again = f"{signal.Signals(number).name} again ends it at once"
        print(f"asked to end: the ranks finish their step and save; {again}", file=sys.stderr, flush=True)
        torchrun.ask_to_end()

    with _handlers({signal.SIGINT: handle, signal.SIGTERM: handle}):
        yield


@contextmanager
def _handlers(wanted: Mapping[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silent(text: str) -> None:
    """Rank 0 announces the plan; once is enough."""
