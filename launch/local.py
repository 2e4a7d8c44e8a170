"""``stoker train``: a run on this machine. Validates here, so that a refusal is one line; then the agent takes over."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from launch.machine import choose_ranks, environment_for
from launch.preflight.run import quick
from launch.supervise import logs
from launch.supervise.agent import Agent, Work, asked_to_end
from launch.supervise.node import Alone
from launch.supervise.policy import Decision
from pretrain.attempt import ExitClass
from pretrain.config import RunConfig, load
from pretrain.run import World, validate
from pretrain.rundir import attempts
from stoker.secrets import MASK, mask

#: Events that a webhook is told of.
TOLD = ("fault", "restart", "stop", "end")
WEBHOOK = "launch.webhook"


def train(
    source: str,
    overrides: Sequence[str] = (),
    ranks: int | None = None,
    max_restarts: int | None = None,
    watch: Callable[[Agent], None] | None = None,
    insist: bool = True,
) -> int:
    """Run a configuration on ``ranks`` processes of this machine (None: as many as suit it); returns the exit code of
    DESIGN section 8. ``max_restarts``: other than ``launch.max_restarts``. ``watch`` runs beside it in a thread.

    SIGINT, SIGTERM and SIGUSR1 ask the ranks for an urgent checkpoint; a second one ends them at once, unless not to
    ``insist``.
    """
    config = load(source, overrides)
    ranks = choose_ranks(config) if ranks is None else ranks
    validate(config, World(rank=0, size=ranks, local_rank=0), announce=_silent)
    quick(config, ranks).refuse()
    restarts = config.launch.max_restarts if max_restarts is None else max_restarts
    environment = environment_for(config, ranks)
    print(f"$ {by_hand([source, *overrides], ranks, environment)}", flush=True)
    node = Alone(config.run_dir, ranks, restarts, listeners(config))
    agent = Agent(Work(config.run_dir, (source, *overrides), ranks, environment, config.launch), node)
    with asked_to_end(agent, insist), _beside(watch, agent):
        code = agent.run()
    conclude(config, agent.decision)
    return code


def by_hand(arguments: Sequence[str], ranks: int, environment: Mapping[str, str]) -> str:
    """The command that does the same without a supervisor, as a person types it into a shell; secrets are masked."""
    shown = [f"{WEBHOOK}={MASK}" if argument.startswith(f"{WEBHOOK}=") else mask(argument) for argument in arguments]
    command = ["torchrun", "--standalone", f"--nproc-per-node={ranks}", "-m", "pretrain", *shown]
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])


def conclude(config: RunConfig, decision: Decision) -> None:
    """One line on stderr that says why a launch ended, where a rank has not said it already."""
    outcome = decision.cause.exit_class
    if outcome in (ExitClass.DONE, ExitClass.REFUSED):  # nothing to say, and said by rank 0
        return
    text = " ".join(decision.text.split())
    if outcome is ExitClass.FAULT:
        number, rank = max(attempts(config.run_dir), default=0), decision.cause.rank
        folder = logs.folder(config.run_dir, number)
        text += f" ({folder if rank is None else logs.log_path(config.run_dir, number, rank)})"
    print(f"{outcome.value}: {text}", file=sys.stderr, flush=True)


def listeners(config: RunConfig) -> list[Callable[[dict[str, Any]], None]]:
    if config.launch.webhook is None:
        return []
    from launch.watch.webhook import tell

    def listener(event: dict[str, Any]) -> None:
        if event["event"] in TOLD:
            tell(config.launch.webhook, event)

    return [listener]


class _beside:
    """A thread that runs ``watch(agent)`` while the block does; what it raises is raised when the block ends."""

    def __init__(self, watch: Callable[[Agent], None] | None, agent: Agent) -> None:
        self._error: BaseException | None = None
        self._agent = agent
        self._thread = threading.Thread(target=partial(self._run, watch), daemon=True) if watch else None

    def _run(self, watch: Callable[[Agent], None]) -> None:
        try:
            watch(self._agent)
        except BaseException as error:
            self._error = error
            self._agent.kill()

    def __enter__(self) -> None:
        if self._thread:
            self._thread.start()

    def __exit__(self, *raised: object) -> None:
        if self._thread:
            self._thread.join()
        if self._error is not None and raised[0] is None:
            raise self._error


def _silent(text: str) -> None:
    """Rank 0 announces the plan; once is enough."""
