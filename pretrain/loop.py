"""The step, and the run that repeats it.

A step counts from 0 and consumes the batch ``plan(step)``; a skipped batch consumes a step, not an update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataio.types import Batch
from pretrain.attempt import Exit, ExitClass
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

    trainer.replicas.zero_gradients()
    losses = trainer.pipeline.run(micro_batches, rows=micro_batches[0].tokens.shape[0])
    trainer.replicas.reduce_gradients()

    report = trainer.measure(step, losses, normalisers, preempted)  # equal on every rank, and so is the verdict
    verdict = trainer.health.judge(report)
    if verdict == "apply":
        trainer.apply(report, lr)  # weights, moments, router bias, counters: nothing moved before
    return report, verdict


def train(session: Session) -> Exit:
    """Every step from where the run stands to its end; says how it ended."""
    steps = session.config.run.steps
    with session:
        for step in range(session.first_step, steps):
            plan, batch = session.read(step)
            lr = session.lr(step)
            report, verdict = train_step(
                session.trainer, step, batch, plan.global_batch, lr, preempted=session.preemption_asked
            )
            done, ends = step + 1, step + 1 == steps or verdict == "stop" or report.preempted
            measured = session.evaluate() if session.due(done, session.config.eval.every) or done == steps else {}
            session.record(plan, report, verdict, lr, measured)
            if session.due(done, session.config.checkpoint.every) or ends:
                session.save(done, must=ends)
            if verdict == "stop":
                return session.conclude(ExitClass.STOPPED, f"step {step}: {session.trainer.health.describe()}")
            if report.preempted and done < steps:
                return session.conclude(ExitClass.PREEMPTED, f"asked to end; step {done} is saved")
        return session.conclude(ExitClass.DONE)
