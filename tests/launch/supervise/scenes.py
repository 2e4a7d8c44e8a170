"""A supervised run of two ranks on the smallest model, something done to it from outside, and what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch.local import train
from launch.supervise import journal, processes
from launch.supervise.agent import Agent
from pretrain.events import METRICS
from stoker.files import read_jsonl
from tests.launch.supervise import faulty
from tests.launch.tiny import fixed, tiny

STEPS = 24
OVERRIDES = (f"run.steps={STEPS}", "checkpoint.every=4", "log.every=1000")


@dataclass
class Scene:
    """``config``: of a tiny model; ``root``: of the run that is disturbed, ``whole`` of the one that is not."""

    config: Path
    name: str = "cut"
    overrides: Sequence[str] = OVERRIDES
    #: When it was disturbed, on the clock of the journal's lines (for durations of seconds only).
    struck: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.config.parent / "runs" / self.name

    def run(self, watch: Callable[[Agent], None] | None = None, *more: str, **options: Any) -> int:
        return train(str(self.config), [*self.overrides, f"run.name={self.name}", *more], 2, watch=watch, **options)

    def lines(self) -> list[dict[str, Any]]:
        return read_jsonl(self.root / METRICS) if (self.root / METRICS).exists() else []

    def journal(self, event: str | None = None) -> list[dict[str, Any]]:
        return [line for line in journal.read(self.root) if event in (None, line["event"])]

    def strike_when(self, ready: Callable[[], bool], blow: Callable[[Agent], None]) -> Callable[[Agent], None]:
        """For ``watch``: waits until ``ready``, then strikes."""

        def watch(agent: Agent) -> None:
            wait_for(lambda: not agent.running or ready())
            if agent.running:
                self.struck = time.time()
                blow(agent)

        return watch

    def trained(self, steps: int) -> Callable[[], bool]:
        return lambda: len(self.lines()) >= steps

    def warm(self, steps: int) -> Callable[[], bool]:
        """So many steps are done, and both spares wait."""
        return lambda: len(self.lines()) >= steps and len(self.journal("spare_ready")) >= 2

    def faults(self, monkeypatch: pytest.MonkeyPatch, rank: int, step: int, what: str, once: bool = True) -> None:
        """Something happens inside of a rank."""
        path = self.config.parent / "fault.json"
        path.write_text(json.dumps({"rank": rank, "step": step, "what": what, "once": once}))
        monkeypatch.setenv(faulty.FAULT_FILE, str(path))
        monkeypatch.setattr(processes, "MODULE", faulty.HERE)

    def curve(self) -> list[dict[str, Any]]:
        return fixed(self.root)


def scene(folder: Path, **options: Any) -> Scene:
    return Scene(tiny(folder), **options)


def wait_for(condition: Callable[[], bool], within_s: float = 120.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "waited for longer than it can take"
        time.sleep(0.01)
