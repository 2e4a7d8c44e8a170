"""Trainers that compute nothing, for tests of the scheduler: they keep a run directory as ``pretrain`` does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from pretrain import events
from pretrain.attempt import ExitClass
from pretrain.config import RunConfig, load
from pretrain.events import StepEvent, Timing
from pretrain.heartbeat import Heartbeat
from pretrain.run import World, validate
from pretrain.rundir import Attempt, begin
from tests.launch import leaky


def loss_of(config: RunConfig, step: int) -> float:
    """A curve that falls, the lower the nearer train.lr is to 0.01."""
    return 1.0 + abs(config.train.lr - 0.01) + 2.0 / (step + 1 + config.run.seed % 3)


def no_op(arguments: Sequence[str]) -> int:
    """Every step recorded, none computed."""
    config, attempt = _begun(arguments)
    for step in range(config.run.steps):
        _record(config, attempt, step)
    attempt.finish(ExitClass.DONE)
    return 0


def slow(arguments: Sequence[str]) -> int:
    """A step every 10 ms, until it is asked to end."""
    config, attempt = _begun(arguments)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    for step in range(config.run.steps):
        _record(config, attempt, step)
        time.sleep(0.01)
        if asked:
            attempt.finish(ExitClass.PREEMPTED, f"asked to end; step {step + 1} is saved")
            return 4
    attempt.finish(ExitClass.DONE)
    return 0


def broken(arguments: Sequence[str]) -> int:
    """By seed: 0 is done, 1 always raises, 2 is killed once, 3 stops by a verdict, 4 is refused."""
    config, attempt = _begun(arguments)
    seed = config.run.seed
    _record(config, attempt, 0)
    if seed == 1:
        print("about to fail, WANDB_API_KEY=0123456789abcdef")
        raise ArithmeticError("always the same")
    if seed == 2 and attempt.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed in (3, 4):
        attempt.finish(ExitClass.STOPPED if seed == 3 else ExitClass.REFUSED, "said so")
        return seed if seed == 3 else 2
    attempt.finish(ExitClass.DONE)
    return 0


def standing(arguments: Sequence[str]) -> int:
    """With a heartbeat, by seed: 0 is done, 1 hangs once, 2 is stopped once, 3 always hangs at the same step, 4 hangs
    once before it has begun."""
    heartbeat = Heartbeat.from_environment()
    heartbeat.at("read")
    seed = load(arguments[0], arguments[1:]).run.seed
    if seed == 4 and not os.path.exists(mark := f"{load(arguments[0], arguments[1:]).run_dir}.tried"):
        open(mark, "w").close()
        _sleep_for_ever()
    config, attempt = _begun(arguments)
    for step in range(config.run.steps):
        heartbeat.at("compute", step)
        if step == 2 and (seed == 3 or (seed == 1 and attempt.number == 1)):
            _sleep_for_ever()
        if step == 2 and seed == 2 and attempt.number == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        _record(config, attempt, step)
        heartbeat.at("record", step)
    attempt.finish(ExitClass.DONE)
    return 0


def leaking(arguments: Sequence[str]) -> int:
    """Prints every secret that it has, raises an error that holds them, and has said why it ended."""
    _, attempt = _begun(arguments)
    try:
        leaky.tell()
    except RuntimeError as error:
        attempt.finish(ExitClass.FAULT, str(error), 0)
        raise
    return 0


def _sleep_for_ever() -> None:
    while True:
        time.sleep(1000)


def _begun(arguments: Sequence[str]) -> tuple[RunConfig, Attempt]:
    config = load(arguments[0], arguments[1:])
    start = validate(config, World(0, 1, 0))
    assert start is not None
    return config, begin(start, config, config.plan(1))


def _record(config: RunConfig, attempt: Attempt, step: int) -> None:
    loss, tokens = loss_of(config, step), config.train.global_batch * config.data.seq_len
    timing = Timing(0.5, tokens / 0.5, None)
    events.write(
        attempt.root,
        StepEvent(attempt.number, step, loss, 1.0, config.train.lr, tokens, tokens, {}, "apply", True, {}, timing),
    )
