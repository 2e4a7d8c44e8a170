"""Where the cases of the matrix run: one folder with the tiny model's data, and the undisturbed runs of each world."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data import DATA_LOG
from pretrain.rundir import prepare
from tests.faults import box, oracles
from tests.faults.box import Box, Network
from tests.faults.runs import Launch, Run, Strike
from tests.launch.tiny import tiny

#: Steps of a run: enough for several faults with a pause before each; and of one in `make test`. Those that pass while
#: spares get ready are few in the latter, since each takes as long as it must.
STEPS, QUICK_STEPS = 96, 24
QUICK = ("launch.hang_s=600",)
#: No spare is needed where no rank is to be replaced.
NO_SPARES = "launch.warm_spares=false"
#: A recurrence and a mixture of experts are in the state.
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
        self._whole: dict[tuple[int, int], Run] = {}
        self._names: set[str] = set()

    def whole(self, ranks: int = 2, steps: int = STEPS) -> Run:
        """The run to which nothing happens."""
        if (ranks, steps) not in self._whole:
            run = Run(self.config, f"whole-{ranks}-{steps}", steps, ranks, (NO_SPARES,))
            try:
                run.start()
                code = run.ended()
            finally:
                run.close()
            assert code == 0 and len(run.lines()) == steps, f"the undisturbed run failed:\n{run.output()}"
            self._whole[ranks, steps] = run
        return self._whole[ranks, steps]

    def _name(self, name: str) -> str:
        unused = next(f"{name}-{i}" for i in range(1, 10_000) if f"{name}-{i}" not in self._names)
        self._names.add(unused)
        return unused

    @contextmanager
    def run(
        self,
        name: str,
        ranks: int = 2,
        *overrides: str,
        steps: int = STEPS,
        data_log: Path | None = None,
        **environment: str,
    ) -> Iterator[Run]:
        """A run on one node, begun; what is left of it is ended after the block. ``data_log``: it has this one from the
        start."""
        place = None if box.missing() else Box("stoker")
        overrides = (*(QUICK if steps == QUICK_STEPS else ()), *overrides)
        run = Run(self.config, self._name(name), steps, ranks, overrides, place, environment=environment)
        if data_log is not None:
            prepare(run.root)
            shutil.copy(data_log, run.root / DATA_LOG)
        try:
            run.start()
            yield run
        finally:
            run.close()
            if place is not None:
                place.close()

    @contextmanager
    def launch(self, name: str, spares: int = 1, steps: int = STEPS, **options: Any) -> Iterator[Launch]:
        """A launch of two nodes, and spares, of a rank each."""
        network = Network(self.folder, 2 + spares)
        name, overrides = self._name(name), QUICK if steps == QUICK_STEPS else ()
        launch = Launch(self.config, name, steps, overrides=overrides, spares=spares, network=network, **options)
        try:
            launch.start()
            yield launch
        finally:
            launch.close()
            network.close()

    def judge(self, run: Run, code: int, *notes: str) -> Outcome:
        return Outcome(code, run.strikes, oracles.check(run, self.whole(run.ranks, run.steps)), list(notes))
