"""What surrounds the step on one rank: data, checkpoints, evaluation, events. ``loop.py`` gives each its turn."""

from __future__ import annotations

import gc
import signal
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from statistics import median
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dataio.types import Batch, BatchPlan
from parallel.engine.groups import create
from parallel.planning.plan import ParallelPlan
from pretrain.attempt import Exit, ExitClass, record_exit
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import RunConfig
from pretrain.data import TOKENIZER, open_heldout, open_stores, read_tokenizer
from pretrain.evaluate import Evaluator
from pretrain.events import StepEvent, Timing
from pretrain.feed import Feed
from pretrain.forecast import Forecast
from pretrain.guards import findings
from pretrain.guards.findings import Finding
from pretrain.guards.stragglers import Stragglers
from pretrain.health import StepReport, Verdict
from pretrain.heartbeat import Heartbeat
from pretrain.kernel_check import used_kernels
from pretrain.rundir import CHECKPOINTS, attempt_path
from pretrain.sinks import Sinks, open_sinks
from pretrain.trainer import Trainer, load_imbalance
from pretrain.workload import workload_of
from stoker import canonical
from stoker.errors import Refusal

#: Steps that are not compared with the prediction, while memory and caches fill; and how many are, at most.
WARM_UP_STEPS, RECENT_STEPS = 4, 1000
#: Signals that end a run in good order: from a scheduler, and from a person.
ENDING = (signal.SIGTERM, signal.SIGINT)


class Session:
    """One attempt on one rank; a context that opens and closes what the attempt holds.

    ``attempt``: its number; ``resume_step``: the checkpoint to begin from, None for the first values;
    ``data_changed``: the configuration's data differ from the last attempt's. ``plan``: the layout that rank 0 decided;
    None: the configuration's. ``forecast``: what is expected of a step, where something is.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        attempt: int,
        resume_step: int | None,
        data_changed: bool = False,
        timeout: timedelta | None = None,
        plan: ParallelPlan | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        self.config, self.rank, self.attempt = config, rank, attempt
        self.root: Path = config.run_dir
        self.spec = config.model_spec()
        plan = plan or config.plan(dist.get_world_size(), announce=lambda text: None)
        self.groups = create(plan, self.spec.tied_embedding, timeout)
        self.stores = open_stores(config)
        self.tokenizer = read_tokenizer(config, self.stores)
        seed = config.run.seed if resume_step is None else None
        deterministic = config.run.deterministic
        self.trainer = Trainer(
            self.spec, self.groups, config.train, config.run.dtype, seed, config.guard, deterministic
        )
        self.heartbeat = Heartbeat.from_environment()
        self._stragglers = Stragglers(self.groups, config.guard.slow_ratio)
        self.checkpoints = CheckpointStore(self.root / CHECKPOINTS, self.groups.control)
        if rank == 0:
            self.checkpoints.fence(attempt)
        self._resumed: dict[str, Any] = {}
        if resume_step is not None:
            self._load(None if config.run.resume == "auto" else resume_step)
        self.first_step = int(self._resumed.get("step", 0))
        self.feed = Feed(config, self.stores, self.groups.control, self.first_step, data_changed)
        if resume_step is not None:
            self.feed.require_state(self._resumed["data"], self.first_step)
            self._count_rewinds()
        self.evaluator = Evaluator(
            self.trainer, open_heldout(config), config.data.seq_len, config.eval.windows, self.tokenizer
        )
        self._threads = self._most_threads()
        device = next(iter(tensor for _, _, tensor in self.trainer.tensors())).device
        self._kernels = used_kernels(self.spec, getattr(torch, config.run.dtype), device)
        self.preemption_asked = False
        self._clock = 0.0
        self._forecast = forecast
        self._flops: dict[int, float] = {}
        self._work = 0.0
        self._setup = int(canonical.sha256([config.masked().resolved(), plan.to_dict()])[:15], 16)
        self._step_times: deque[float] = deque(maxlen=RECENT_STEPS)
        self._sinks: Sinks | None = None

    def __enter__(self) -> Session:
        for number in ENDING:
            signal.signal(number, self._ask_to_end)
        if self.config.run.gc_every is not None:
            gc.collect()
            gc.freeze()
            gc.disable()
        if self.rank == 0:
            self._sinks = open_sinks(self.config, self.root, self.attempt, self.first_step)
        self._say(self._opening())
        if self.feed.note:
            self._say(self.feed.note)
        if self.first_step and self.config.run.deterministic and self._resumed["threads"] != self._threads:
            self._say(
                f"the checkpoint was written by ranks of {self._resumed['threads']} threads and these have "
                f"{self._threads}: sums on the CPU are rounded otherwise, and the curve is not the same to the last bit"
            )
        if self.first_step and (before := self._resumed.get("kernels", self._kernels)) != self._kernels:
            self._say(
                f"the checkpoint was written with the kernels {before} and these are {self._kernels}: they round "
                "otherwise, and the curve is not the same to the last bit"
            )
        if not self._resumed and self.config.guard.spike == "rewind":
            self.save(0)  # what a spike before the first checkpoint goes back to
        self._clock = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        gc.enable()
        gc.unfreeze()
        if error is None:
            self._stragglers.finish()
        self.heartbeat.at("end", self.heartbeat.step)  # a server that W&B waits for is no hang
        if self._sinks is not None:
            self._sinks.close()
        if error is None:
            # A rank that left now would be a failed worker to torchrun, which then ends rank 0 in the middle of this.
            dist.barrier(group=self.groups.control)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask_to_end(self, number: int, frame: FrameType | None) -> None:
        """The step under way is finished and saved; a second request is the default's business."""
        self.preemption_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def conclude(self, exit_class: ExitClass, cause: str = "", finding: Finding | None = None) -> Exit:
        """How the run ended, and the finding that ended it, written down before anything slow is closed."""
        ended = Exit(exit_class, cause, None)
        if finding is not None:
            kind = finding.kind if exit_class is ExitClass.FAULT else ""
            cause = cause if finding.text in cause else f"{cause} ({finding.text})"
            ended = Exit(exit_class, cause, finding.rank, kind, finding.step)
        if self.rank == 0:
            path = attempt_path(self.root, self.attempt)
            record_exit(path, exit_class, ended.cause, ended.rank, kind=ended.kind, step=ended.step)
        self._compare()
        return ended

    def _compare(self) -> None:
        """Predicted beside measured."""
        if self._forecast is None:
            return
        if len(self._step_times) > WARM_UP_STEPS:
            self._say(self._forecast.beside_step(median(list(self._step_times)[WARM_UP_STEPS:])))
        if torch.cuda.is_available():
            self._say(self._forecast.beside_memory(torch.cuda.max_memory_allocated()))

    def _opening(self) -> str:
        plan = self.groups.plan
        start = f"resumes at step {self.first_step}" if self.first_step else "starts"
        return (
            f"{self.config.run.name}, attempt {self.attempt}: {start}; {self.spec.num_parameters:,} parameters, "
            f"{self.config.run.dtype}, {plan.world_size} ranks (tp {plan.tp}, pp {plan.pp}, dp {plan.dp}, ep {plan.ep})"
        )

    def tell(self, finding: Finding) -> None:
        """What a guard found: a line said, and one in guards.jsonl."""
        if self.rank == 0:
            findings.write(self.root, self.attempt, finding)
        self._say(f"step {finding.step}: {finding.text}")

    def _say(self, text: str) -> None:
        if self._sinks is not None:
            self._sinks.say(text)

    def _most_threads(self) -> int:
        """Threads of a rank, the most on any: sums on the CPU depend on it in their last bits."""
        threads = torch.tensor([torch.get_num_threads()])
        dist.all_reduce(threads, op=dist.ReduceOp.MAX, group=self.groups.control)
        return int(threads)

    def due(self, done: int, every: int | None) -> bool:
        """``done`` steps are a multiple of ``every``."""
        return every is not None and done % every == 0

    def lr(self, step: int) -> float:
        train = self.config.train
        return train.lr * train.schedule.multiplier(step, self.config.run.steps)

    def read(self, step: int) -> tuple[BatchPlan, Batch]:
        """The step's addresses, and this rank's part of its tokens."""
        self.heartbeat.at("read", step)
        plan, batch = self.feed.read(step, self.trainer.part, self._planned)
        if self.feed.changes(step):
            self.trainer.health.spikes.forget()
        self.heartbeat.at("compute", step)
        return plan, batch

    def _planned(self, plan: BatchPlan) -> None:
        """What the step costs follows from the data log, which may say something else from any step on."""
        if plan.seq_len not in self._flops:
            self._flops[plan.seq_len] = workload_of(self.spec, plan.seq_len).training_flops
        self._work = self._flops[plan.seq_len] * plan.global_batch * plan.seq_len
        self.heartbeat.works(self._work, self._setup)

    def evaluate(self) -> dict[str, float]:
        """Held-out loss by domain: nats per token, bits per byte."""
        self.heartbeat.at("evaluate", self.heartbeat.step)
        return self.evaluator.run()

    def record(
        self, plan: BatchPlan, report: StepReport, verdict: Verdict, lr: float, measured: dict[str, float]
    ) -> None:
        """The step's event and findings, to every sink of rank 0, and the collection of garbage if it is due."""
        self.heartbeat.at("record", report.step)
        slow = self._stragglers.add(report.step, self.trainer.clock.take())
        for finding in (*report.findings, *slow):
            self.tell(finding)
        if self.due(report.step + 1, self.config.run.gc_every):
            gc.collect()
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock - self.evaluator.spent_s, now
        self.evaluator.spent_s = 0.0
        if self._sinks is None:
            return
        if self._forecast is not None and self._work == self._forecast.model_flops:  # of the work that was predicted
            self._step_times.append(elapsed)
        mfu = None if self._forecast is None else self._forecast.mfu(elapsed, self._work)
        imbalance = load_imbalance(report.load)
        draws = {name: int((plan.source == index).sum()) for index, name in enumerate(self.feed.stream.sources)}
        self._sinks.step(
            StepEvent(
                attempt=self.attempt,
                step=report.step,
                loss=report.loss,
                grad_norm=report.grad_norm,
                lr=lr,
                valid_targets=report.valid_targets,
                tokens=report.tokens,
                draws=draws,
                verdict=verdict,
                applied=verdict == "apply",
                aux={**report.aux, **({} if imbalance is None else {"load_max_over_mean": imbalance}), **measured},
                timing=Timing(elapsed, report.tokens / elapsed, mfu),
            )
        )
        if measured:
            figures = (f"{name.removeprefix('heldout.')} {value:.4f}" for name, value in measured.items())
            self._say("held out: " + ", ".join(figures))

    def save(self, done: int, must: bool = False) -> None:
        """A checkpoint of the state after ``done`` consumed batches.

        A disk that fails is said and training goes on, with the checkpoints that were there; ``must``: the run ends
        here, and what cannot be saved would be lost, so that is an error. Raises Mismatch where replicas differ.
        """
        self.heartbeat.at("save", done)
        before = time.perf_counter()
        self.trainer.twins.before_save(done)
        tensors = {name: (layout, tensor) for name, layout, tensor in self.trainer.tensors()}
        meta = {
            "step": done,
            "updates": self.trainer.optimizer.updates,
            "health": self.trainer.health.state_dict(),
            "data": self.feed.stream.state_dict(),
            "config": self.config.masked().resolved(),
            "plan": self.groups.plan.to_dict(),
            "threads": self._threads,
            "kernels": self._kernels,
            "eos_id": next(iter(self.stores.values())).tokenizer.eos_id,
        }
        files = {TOKENIZER: self.tokenizer} if self.tokenizer is not None else {}
        handle = self.checkpoints.save(done, tensors, meta, self.groups.coords, self.attempt, files)
        if must:
            handle.wait()
        if handle.error is None:
            self.trainer.health.rewinds = 0
            self._prune()
        took = time.perf_counter() - before
        self._clock += took
        outcome = f"in {took:.2f} s" if handle.error is None else f"FAILED, nothing of it is kept: {handle.error}"
        self._say(f"checkpoint of step {done} {outcome}")

    def _prune(self) -> None:
        """Delete what is not to be kept. That it fails costs disk space, not the run."""
        try:
            self.checkpoints.prune(self.config.checkpoint.keep_last, self.config.checkpoint.keep_every)
        except (OSError, Refusal) as error:
            self._say(f"older checkpoints were not deleted: {error}")

    def rewind(self, step: int) -> int:
        """Back to the newest checkpoint that is good, which is no later than ``step``; when the run comes to ``step``
        again it reads the batch after. Returns the step to go on with."""
        self.heartbeat.at("load", step)
        self.feed.pass_over(step)
        self._load(None)
        self._count_rewinds()
        back = int(self._resumed["step"])
        text = f"back to step {back}, and past the batch of step {step}"
        self.tell(Finding(step, "rewind", text, None, {"checkpoint": back, "rewinds": self.trainer.health.rewinds}))
        self._clock = time.perf_counter()
        return back

    def _count_rewinds(self) -> None:
        """Those since the checkpoint that was loaded, as the data log has them: the same after a kill as without."""
        self.trainer.health.rewinds = self.feed.rewinds(int(self._resumed["data"]["segments"]))

    def _load(self, step: int | None) -> None:
        """Load the checkpoint of ``step``, or the newest that is good: a damaged one gives way."""
        trainer = self.trainer
        layouts = {name: layout for name, layout, _ in trainer.tensors()}
        into = {name: tensor for name, _, tensor in trainer.tensors()}
        _, self._resumed = self.checkpoints.load(step, layouts, self.groups.coords, into)
        if step is not None:
            self.checkpoints.abandon_after(step)
        trainer.optimizer.set_updates(int(self._resumed["updates"]))
        trainer.health.load_state_dict(self._resumed["health"])
