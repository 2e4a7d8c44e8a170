"""Where the cases of the matrix run: one folder with the tiny model's data, and the undisturbed runs of each world."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import box, oracles
from tests.faults.box import Box, Network
from tests.faults.runs import Launch, Run, Strike
from tests.launch.tiny import tiny

#: Every run has so many steps; a recurrence and a mixture of experts are in its state.
STEPS = 96
LAYERS = ("gated_delta/dense", "attention/moe")


@dataclass
class Outcome:
    """What came of a case. ``oracles``: by name what does not hold, in words. ``notes``: for the table."""

    code: int
    strikes: list[Strike] = field(default_factory=list)
    oracles: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [f"{name}: {each}" for name, found in self.oracles.items() for each in found]


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = tiny(folder, LAYERS)
        self._whole: dict[int, Run] = {}
        self._names: set[str] = set()

    def whole(self, ranks: int = 2) -> Run:
        """The run to which nothing happens."""
        if ranks not in self._whole:
            run = Run(self.config, f"whole-{ranks}", STEPS, ranks)
            try:
                run.start()
                code = run.ended()
            finally:
                run.close()
            assert code == 0 and len(run.lines()) == STEPS, f"the undisturbed run failed:\n{run.output()}"
            self._whole[ranks] = run
        return self._whole[ranks]

    def _name(self, name: str) -> str:
        unused = next(f"{name}-{i}" for i in range(1, 10_000) if f"{name}-{i}" not in self._names)
        self._names.add(unused)
        return unused

    @contextmanager
    def run(self, name: str, ranks: int = 2, *overrides: str, **environment: str) -> Iterator[Run]:
        """A run on one node, begun; what is left of it is ended after the block."""
        place = None if box.missing() else Box("stoker")
        run = Run(self.config, self._name(name), STEPS, ranks, overrides, place, environment=environment)
        try:
            run.start()
            yield run
        finally:
            run.close()
            if place is not None:
                place.close()

    @contextmanager
    def launch(self, name: str, spares: int = 1, **options: Any) -> Iterator[Launch]:
        """A launch of two nodes, and spares, of a rank each."""
        network = Network(self.folder, 2 + spares)
        name = self._name(name)
        launch = Launch(self.config, name, STEPS, spares=spares, network=network, **options)
        try:
            launch.start()
            yield launch
        finally:
            launch.close()
            network.close()

    def judge(self, run: Run, code: int, *notes: str) -> Outcome:
        return Outcome(code, run.strikes, oracles.check(run, self.whole(run.ranks)), list(notes))
