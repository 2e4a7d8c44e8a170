"""One pool and one single-process reference per model for the whole session; what was measured is told at its end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from parallel.planning.plan import ParallelPlan
from pretrain.spec import ModelSpec
from tests.parity import jobs
from tests.parity.compare import Compare, Difference, Run, assemble, difference
from tests.parity.pool import Pool
from tests.parity.specs import ONE

#: (name of the case, how far it was from one process) in the order of the tests.
_MEASURED = pytest.StashKey[list[tuple[str, Difference]]]()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def compare(pool: Pool, pytestconfig: pytest.Config) -> Compare:
    measured = pytestconfig.stash.setdefault(_MEASURED, [])

    def run(spec: ModelSpec, plan: ParallelPlan, steps: int, mutation: str | None = None) -> Run:
        return assemble(pool.run(plan.world_size, jobs.train, spec, plan.to_dict(), "float64", steps, mutation))

    @cache
    def reference(spec: ModelSpec, steps: int) -> Run:
        return run(spec, ONE, steps)

    def compare(
        spec: ModelSpec, plan: ParallelPlan, steps: int, mutation: str | None = None, name: str = ""
    ) -> Difference:
        found = difference(run(spec, plan, steps, mutation), reference(spec, steps))
        if name:
            measured.append((name, found))
        return found

    return compare


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash.get(_MEASURED, [])
    if measured:
        terminalreporter.section("parity with one process, float64, worst of each case")
        width = max(len(name) for name, _ in measured)
        for name, found in measured:
            terminalreporter.line(f"{name:{width}}  {found}")
