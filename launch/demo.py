"""``make demo``: a whole run on this machine: corpus, training on two processes, a rank killed, recovery, text.

    python -m launch.demo [section.key=value ...]

Everything it says at the end it measured. It fails (exit code 1) where the model is no better than the frequency of
tokens, where experts are used unevenly, or where the run that went on by itself did not repeat, to the last bit, the
steps that the killed attempt had done.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.local import train
from launch.supervise import journal
from launch.supervise.agent import Agent
from pretrain import events
from pretrain.config import RunConfig, load
from pretrain.events import METRICS, StepEvent
from pretrain.rundir import committed_steps, refuse_in_use
from stoker.errors import Refusal
from stoker.files import read_jsonl

PRESET, DATA, RANKS = "demo", Path("data/demo"), 2
#: Experts over the two ranks: of the model-parallel axes the fastest for this model, in processor time a step (tp 1.5
#: and pp 1.3 times as much; two cores, gloo, November 2026).
LAYOUT = ("parallel.ep=2",)
LAYOUT_REASON = "experts are exchanged in their own layers only; tensor parallelism would gather in every layer"
PROMPTS = {
    "code": "def read_lines(path):\n",
    "prose": "The following example shows how to",
}
#: Largest load of an expert over the mean of its layer, at the end of the run.
MAX_IMBALANCE = 2.0


@dataclass
class Kill:
    """A rank that is killed at a random moment once a checkpoint exists: ``watch`` waits for it and strikes.

    ``pause_s``: longest wait after the chosen step was logged, so that any moment of a step, a save or an evaluation
    can be hit. ``rank``, ``checkpoint`` (the newest) and ``step`` say what happened; rank None: nothing did.
    """

    config: RunConfig
    pause_s: float = 1.0
    rank: int | None = None
    checkpoint: int = 0
    step: int = 0
    chance: random.Random = field(default_factory=random.SystemRandom)

    def watch(self, agent: Agent) -> None:
        root, every = self.config.run_dir, self.config.checkpoint.every or 1
        after = self.chance.randint(1, every - 1) if every > 1 else 0
        while agent.running:
            steps = committed_steps(root)
            if steps and num_lines(root) >= max(steps) + after:
                time.sleep(self.chance.uniform(0, self.pause_s))
                if num_lines(root) <= max(committed_steps(root)):
                    continue  # a checkpoint came meanwhile: nothing would be done twice
                if not (ranks := sorted(agent.pids())):
                    return
                self.rank = self.chance.choice(ranks)
                agent.signal(self.rank, signal.SIGKILL)
                self.checkpoint, self.step = max(committed_steps(root)), num_lines(root)
                print(f"rank {self.rank} was sent SIGKILL in step {self.step}; nobody else does anything", flush=True)
                return
            time.sleep(0.05)


def main(overrides: Sequence[str]) -> int:
    """The demo; returns its exit code."""
    began = time.perf_counter()
    try:
        return _demo([*LAYOUT, *overrides], began)
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2


def _demo(overrides: Sequence[str], began: float) -> int:
    corpus = _corpus()
    config = load(PRESET, overrides)
    _make_room(config.run_dir)
    _title("plan for this machine")
    print(config.plan(RANKS).explain(), f"why: {LAYOUT_REASON}", sep="\n", flush=True)

    _title(f"train on {RANKS} processes, and kill one")
    kill = Kill(config)
    if code := train(PRESET, overrides, RANKS, watch=kill.watch):
        return code
    if kill.rank is None:
        raise Refusal(f"the run ended before a rank could be killed: raise run.steps above {config.run.steps}")

    _title("text")
    from pretrain.generate import generate
    from pretrain.report import write_report

    texts = generate(config.run_dir, list(PROMPTS.values()), max_tokens=48, temperature=0.7)
    for (domain, prompt), text in zip(PROMPTS.items(), texts, strict=True):
        print(f"[{domain}] {prompt}{text}\n")
    report = write_report(config.run_dir)

    run = events.read(config.run_dir)
    redone = Redone.of(config.run_dir, kill.checkpoint)
    baselines = _baselines(config)
    _title("what was done")
    for line in (
        *_told(config, corpus, run),
        f"killed:     rank {kill.rank}, SIGKILL in step {kill.step}; the run went on by itself from step "
        f"{kill.checkpoint}, {redone}",
        f"recovery:   {_recovery(config.run_dir)}",
        *_held_out(run[-1], baselines),
        f"experts:    largest load over the mean {_imbalance(run):.2f} at the end (limit {MAX_IMBALANCE:.0f})",
        f"report:     {report}",
        f"time:       {time.perf_counter() - began:.0f} s from start to end",
    ):
        print(line)
    return _judge(run, baselines, corpus, redone)


def _corpus() -> dict[str, Any]:
    from dataio.demo import build

    _title("corpus")
    began = time.perf_counter()
    corpus = build(DATA)
    print(
        f"{DATA}: {_total(corpus, 'documents'):,} documents, ready after {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return corpus


def _total(corpus: dict[str, Any], what: str) -> int:
    return sum(store[what] for store in corpus["stores"].values())


def _make_room(run_dir: Path) -> None:
    """A demo begins from nothing: the run of an earlier one is moved aside, the one before that is deleted."""
    if not run_dir.exists():
        return
    refuse_in_use(run_dir)
    aside = run_dir.with_name(f"{run_dir.name}.before")
    shutil.rmtree(aside, ignore_errors=True)
    run_dir.rename(aside)
    print(f"the earlier run is now {aside}")


def num_lines(run_dir: Path) -> int:
    """Steps that all attempts together have logged."""
    metrics = run_dir / METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@dataclass(frozen=True)
class Redone:
    """Steps that two attempts have done, and how many of them came out the same to the last bit (P5)."""

    steps: int
    equal: int

    @classmethod
    def of(cls, run_dir: Path, checkpoint: int) -> Redone:
        by_step: dict[int, list[dict[str, Any]]] = {}
        for line in read_jsonl(run_dir / METRICS):
            event = StepEvent.from_json(line)
            by_step.setdefault(event.step, []).append(events.deterministic(event))
        twice = [found for step, found in by_step.items() if step >= checkpoint and len(found) > 1]
        return cls(len(twice), sum(all(other == found[0] for other in found) for found in twice))

    def __str__(self) -> str:
        return f"{self.steps} steps redone, {self.equal} of them equal to the last bit"


def _recovery(run_dir: Path) -> str:
    """What the supervisor measured."""
    again = [line["seconds"] for line in journal.read(run_dir) if line["event"] == "training" and "seconds" in line]
    return ", ".join(f"{seconds:.1f} s from noticing until the first step was done again" for seconds in again)


def _baselines(config: RunConfig) -> dict[str, tuple[float, float]]:
    """Nats per token of unigram and bigram counts of the training text, on each held-out domain."""
    from dataio.baseline import bigram, unigram
    from pretrain.data import open_heldout, open_stores

    train_stores = list(open_stores(config).values())
    one, two = unigram(train_stores), bigram(train_stores)
    return {
        domain: (one.cross_entropy([store]), two.cross_entropy([store]))
        for domain, store in open_heldout(config).items()
    }


def _told(config: RunConfig, corpus: dict[str, Any], run: list[StepEvent]) -> list[str]:
    spec, plan = config.model_spec(), config.plan(RANKS)
    tokens = sum(event.tokens for event in run)
    speeds = sorted(event.timing.tokens_per_s or math.nan for event in run)
    return [
        f"corpus:     {_total(corpus, 'documents'):,} documents, {_total(corpus, 'bytes') / 1e6:.1f} MB, "
        f"{_total(corpus, 'tokens') / 1e6:.2f} M tokens, code and prose",
        f"model:      {spec.num_parameters:,} parameters in {len(spec.layers)} layers, {config.run.dtype}, on "
        f"{plan.world_size} ranks (tp {plan.tp}, pp {plan.pp}, dp {plan.dp}, ep {plan.ep})",
        f"training:   {len(run)} steps, {tokens:,} tokens, {speeds[len(speeds) // 2]:,.0f} tokens/s in the median step",
        f"loss:       {run[0].loss:.4f} in the first step, {run[-1].loss:.4f} in the last, nats per token",
    ]


def _held_out(last: StepEvent, baselines: dict[str, tuple[float, float]]) -> list[str]:
    lines = []
    for domain, (one, two) in baselines.items():
        found = last.aux[f"heldout.{domain}.nats_per_token"]
        per_byte = last.aux[f"heldout.{domain}.bits_per_byte"]
        counts = f"unigram counts {one:.3f}, bigram counts {two:.3f}"
        lines.append(f"held out:   {domain} {found:.3f} nats per token ({counts}), {per_byte:.3f} bits per byte")
    return lines


def _imbalance(run: list[StepEvent]) -> float:
    return run[-1].aux["load_max_over_mean"]


def _judge(
    run: list[StepEvent], baselines: dict[str, tuple[float, float]], corpus: dict[str, Any], redone: Redone
) -> int:
    """0, or 1 and the reason where the demo did not show what it is there to show."""
    entropy = corpus["unigram_entropy"]
    held_out = sum(run[-1].aux[f"heldout.{domain}.nats_per_token"] for domain in baselines) / len(baselines)
    wrong = []
    if not held_out < entropy:
        wrong.append(f"held-out loss {held_out:.3f} is not below the unigram entropy of the corpus, {entropy:.3f}")
    if not _imbalance(run) <= MAX_IMBALANCE:
        wrong.append(f"expert load {_imbalance(run):.2f} is above {MAX_IMBALANCE}")
    if not redone.steps:
        wrong.append("no step was done twice: that resuming repeats the run was not shown")
    if redone.equal != redone.steps:
        wrong.append(f"{redone.steps - redone.equal} redone steps came out differently")
    for reason in wrong:
        print(f"fault: {reason}", file=sys.stderr)
    if not wrong:
        print(f"held-out loss {held_out:.3f} is below the unigram entropy of the corpus, {entropy:.3f}")
    return bool(wrong)


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
