"""The step, and the run that repeats it.

A step counts from 0 and consumes the batch ``plan(step)``; a skipped batch consumes a step, not an update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataio.types import Batch
from pretrain.attempt import Exit, ExitClass
from pretrain.guards.replicas import Mismatch
from pretrain.health import StepReport, Verdict
from pretrain.trainer import Trainer

if TYPE_CHECKING:
    from pretrain.session import Session


def train_step(
    trainer: Trainer, step: int, batch: Batch, windows: int, lr: float, preempted: bool = False
) -> tuple[StepReport, Verdict]:
    """One step on this data rank's part ``batch`` of a global batch of ``windows`` windows."""
    normalisers = trainer.normalisers(batch, windows)  # the global number of valid targets divides every sum (P1)
    micro_batches = trainer.micro_batches(batch, normalisers)

    def compute() -> StepReport:
        trainer.replicas.zero_gradients()
        losses = trainer.forward_backward(micro_batches)
        trainer.replicas.reduce_gradients()
        return trainer.measure(step, losses, normalisers, preempted)  # equal on every rank, and so is the verdict

    report = trainer.recompute.believed(compute)  # twice, where the numbers are in doubt
    verdict = trainer.health.judge(report)
    if verdict == "apply":
        trainer.twins.before_update(step)
        trainer.apply(report, lr)  # weights, moments, router bias, counters: nothing moved before
    return report, verdict


def train(session: Session) -> Exit:
    """Every step from where the run stands to its end; says how it ended."""
    with session:
        try:
            return _steps(session)
        except Mismatch as mismatch:  # on every rank alike; what disagrees is not saved
            session.tell(mismatch.finding)
            return session.conclude(ExitClass.FAULT, str(mismatch), mismatch.finding)


def _steps(session: Session) -> Exit:
    step, steps = session.first_step, session.config.run.steps
    while step < steps:
        plan, batch = session.read(step)
        lr = session.lr(step)
        report, verdict = train_step(
            session.trainer, step, batch, plan.global_batch, lr, preempted=session.preemption_asked
        )
        done, ends = step + 1, step + 1 == steps or verdict == "stop" or report.preempted
        measured = session.evaluate() if session.due(done, session.config.eval.every) or done == steps else {}
        session.record(plan, report, verdict, lr, measured)
        if verdict == "rewind":
            done = session.rewind(step)  # its checkpoint is there
        elif session.due(done, session.config.checkpoint.every) or ends:
            session.save(done, must=ends)
        if verdict == "stop":
            return session.conclude(
                ExitClass.STOPPED, f"step {step}: {session.trainer.health.describe()}", *report.findings[-1:]
            )
        if report.preempted and done < steps:
            return session.conclude(ExitClass.PREEMPTED, f"asked to end; step {done} is saved")
        step = done
    return session.conclude(ExitClass.DONE)
