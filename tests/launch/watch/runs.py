"""Run directories as a supervised trainer leaves them, made without training: any number of steps, ranks, attempts."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from parallel.planning.plan import ParallelPlan
from pretrain.events import METRICS, StepEvent, Timing
from pretrain.rundir import ATTEMPTS, CONFIG, LOCK, PLAN, prepare

LAYERS = ("gated_delta/dense", "gated_delta/moe", "attention/moe")


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


@dataclass
class FakeRun:
    """``root`` is made with its stamp, configuration and plan of ``ranks`` ranks for ``steps`` steps."""

    root: Path
    steps: int = 1000
    ranks: int = 4
    step_time_s: float = 0.5
    began: float = field(default_factory=lambda: time.time() - 3600)

    def __post_init__(self) -> None:
        prepare(self.root)
        layers = ", ".join(LAYERS)
        (self.root / CONFIG).write_text(
            f"run: {{name: {self.root.name}, steps: {self.steps}}}\nmodel: {{layers: [{layers}]}}\n"
        )
        plan = ParallelPlan(self.ranks, self.ranks, 1, num_layers=len(LAYERS))
        stamp = {"format": {"name": "plan", "version": 1}}
        (self.root / PLAN).write_text(json.dumps({**stamp, "plan": plan.to_dict(), "predictions": {}}))

    def attempt(self, number: int, resume_step: int | None = None, began: float | None = None) -> Path:
        """Begin an attempt, as rank 0 of this process does."""
        path = self.root / ATTEMPTS / f"{number:04d}"
        path.mkdir(parents=True)
        start = {"host": "node-a", "start": {"resume_step": resume_step, "changes": []}}
        (path / "environment.json").write_text(json.dumps(start))
        if began is not None:
            os.utime(path / "environment.json", (began, began))
        (self.root / LOCK).write_text(f"process {os.getpid()} on {platform.node()}")
        return path

    def end(self, number: int, ended: float | None = None, **fields: Any) -> None:
        """How an attempt ended: ``class``, cause, rank and, in version 2, kind, step."""
        path = self.root / ATTEMPTS / f"{number:04d}" / "exit.json"
        version = 2 if "kind" in fields else 1
        defaults: dict[str, Any] = {"cause": "", "rank": None}
        if version == 2:
            defaults |= {"step": None, "host": None, "fingerprint": None}
        path.write_text(json.dumps({"format": {"name": "exit", "version": version}, **defaults, **fields}))
        if ended is not None:
            os.utime(path, (ended, ended))

    def train(self, attempt: int, steps: Iterable[int], seed: int = 0, **changed: Any) -> None:
        """Append the lines of these steps."""
        with open(self.root / METRICS, "a", encoding="utf-8") as file:
            for step in steps:
                file.write(self.event(attempt, step, seed, **changed).to_line() + "\n")

    def event(self, attempt: int, step: int, seed: int = 0, **changed: Any) -> StepEvent:
        noise = float(np.random.default_rng((seed, step)).normal())
        loss = 3.2 + 5.1 / (1 + step / 40) ** 0.7 + 0.03 * noise
        values: dict[str, Any] = {
            "loss": loss,
            "grad_norm": float(0.8 + 3 / (1 + step / 60) + 0.1 * abs(noise)),
            "lr": 1e-3 * min(1.0, (step + 1) / 50),
            "valid_targets": 2047,
            "tokens": 2048,
            "draws": {"code": 5, "prose": 3 - step % 2},
            "verdict": "apply",
            "applied": True,
            "aux": {"balance_loss": 0.3 + 0.01 * noise, "load_max_over_mean": 1.2 + 0.1 * abs(noise)},
            "timing": Timing(self.step_time_s, 2048 / self.step_time_s * (1 + 0.05 * noise), None),
        }
        return StepEvent(attempt=attempt, step=step, **{**values, **changed})

    def journal(self, lines: Sequence[dict[str, Any]]) -> None:
        """What the supervisor wrote; ``at`` (seconds since the run began) becomes its time."""
        with open(self.root / "supervisor.jsonl", "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps({"time": moment(self.began + line["at"]), **line}) + "\n")

    def guards(self, lines: Sequence[dict[str, Any]]) -> None:
        with open(self.root / "guards.jsonl", "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps({"schema": 1, "time": moment(self.began + line["at"]), **line}) + "\n")

    def beats(self, attempt: int, step: int, state: str = "running", per_node: int = 8, **odd: dict[str, Any]) -> None:
        """What the supervisor says of its ranks; ``odd``: fields of single ranks by name, r5={"age_s": 9.0}."""
        (self.root / ".supervisor.lock").write_text(f"process {os.getpid()} on {platform.node()}")
        ranks = [
            {
                "rank": rank,
                "node": f"node-{rank // per_node:04d}",
                "pid": 1000 + rank,
                "alive": True,
                "phase": "compute",
                "step": step,
                "age_s": 0.2,
                "busy_s": 812.5,
                "rss_bytes": 1_400_000_000,
                **odd.get(f"r{rank}", {}),
            }
            for rank in range(self.ranks)
        ]
        head = {"format": {"name": "ranks", "version": 1}, "time": moment(time.time()), "host": platform.node()}
        content = {**head, "pid": os.getpid(), "attempt": attempt, "state": state, "ranks": ranks}
        (self.root / "ranks.json").write_text(json.dumps(content))

    def log(self, attempt: int, rank: int, lines: Iterable[tuple[float, str, str]]) -> None:
        """What a rank printed: seconds since the run began, stream, text."""
        folder = self.root / "logs" / f"{attempt:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank_{rank:05d}.log", "a", encoding="utf-8") as file:
            for at, stream, text in lines:
                file.write(f"{moment(self.began + at)} {stream} {text}\n")


def eventful(root: Path, steps: int = 1000, ranks: int = 16) -> FakeRun:
    """A run in its third attempt: a killed rank, a hang, a skipped step, a slow rank and a quiet one."""
    run = FakeRun(root, steps, ranks, began=time.time() - 760)
    run.journal([{"at": 0, "event": "start", "attempt": 1, "text": f"{ranks} ranks"}])
    run.attempt(1, began=run.began + 4)
    run.train(1, range(0, 431))
    run.end(
        1, run.began + 222, **{"class": "fault", "cause": "rank 3 was killed by SIGKILL", "rank": 3, "kind": "signal"}
    )
    run.journal(
        [
            {
                "at": 221.6,
                "event": "fault",
                "attempt": 1,
                "rank": 3,
                "kind": "signal",
                "text": "rank 3 was killed by SIGKILL",
            },
            {"at": 222, "event": "restart", "attempt": 2, "text": "warm spares take over", "seconds": 0.4},
            {"at": 224.9, "event": "training", "attempt": 2, "step": 400, "text": "training again", "seconds": 3.3},
        ]
    )
    run.attempt(2, 400, began=run.began + 223)
    run.train(2, [*range(400, 512)])
    run.train(2, [512], loss=float("nan"), grad_norm=float("nan"), verdict="skip", applied=False)
    run.train(2, range(513, 805))
    cause = "no progress for 6.1 s in all_reduce at step 805"
    run.end(2, run.began + 440, **{"class": "fault", "cause": cause, "rank": 11, "kind": "hang", "step": 805})
    run.guards(
        [
            {
                "at": 290,
                "attempt": 2,
                "step": 512,
                "kind": "nonfinite",
                "rank": 5,
                "text": "loss is NaN, first in layers.2.mixer.q on rank 5",
            }
        ]
    )
    run.journal(
        [
            {
                "at": 439,
                "event": "fault",
                "attempt": 2,
                "rank": 11,
                "kind": "hang",
                "step": 805,
                "text": f"rank 11: {cause}",
            },
            {"at": 440, "event": "restart", "attempt": 3, "text": "rank 11 replaced", "seconds": 1.2},
            {"at": 443, "event": "training", "attempt": 3, "step": 800, "text": "training again", "seconds": 4.1},
        ]
    )
    run.attempt(3, 800, began=run.began + 441)
    run.train(3, range(800, 862), aux={"heldout.code.nats_per_token": 3.61})
    run.train(3, range(862, 905))
    run.guards(
        [
            {
                "at": 700,
                "attempt": 3,
                "step": 900,
                "kind": "slow",
                "rank": 6,
                "text": "rank 6 takes 1.42 times the work time of its peers",
            }
        ]
    )
    run.beats(3, 905, per_node=8, r6={"age_s": 0.9}, r13={"age_s": 21.4, "phase": "compute", "step": 904})
    for step in (800, 900):
        folder = run.root / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "COMMIT").write_text("{}")
    return run
