"""What the planner would have run in place of each published layout, and what that would cost. No torch.

Nobody has run the planner's layouts, so both sides are predicted, for the same model, batch and devices, and by the
published run's own way of execution: its layout, and the one that the planner would choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallel.planning.accuracy.evaluate import Judged
from parallel.planning.execution import Execution
from parallel.planning.published.runs import Run
from parallel.planning.search.planner import search
from parallel.planning.search.problem import Problem
from parallel.planning.search.scored import remembering_time
from parallel.planning.timing.calibration import Calibration
from stoker.errors import Refusal
from stoker.progress import track


@dataclass(frozen=True)
class Regret:
    """``layout``: the planner's own, in words; ``regret``: its predicted step time over the published layout's, less
    one: above zero the planner chose worse by its own lights. ``reason``: why there is none."""

    layout: str | None
    regret: float | None
    reason: str | None = None


def regrets(judged: Iterable[Judged], calibration: Calibration | None = None) -> dict[int, Regret]:
    """By row, for every row that is predicted. A search for each distinct problem: of the order of half a second."""
    problems: dict[Any, list[Judged]] = {}
    for each in judged:
        if each.run is not None and each.step_s is not None:
            problems.setdefault(_key(each.run), []).append(each)
    found: dict[int, Regret] = {}
    for rows in track(problems.values(), "the planner's own layouts"):
        found |= _regrets(rows, calibration)
    return dict(sorted(found.items()))


def _way(run: Run) -> Execution:
    """How the run was executed, but for what the planner decides itself."""
    return replace(run.execution, recompute_modules=(), offload=())


def _key(run: Run) -> Any:
    return id(run.workload), run.plan.world_size, run.plan.global_batch, run.topology, _way(run)


def _regrets(rows: Sequence[Judged], calibration: Calibration | None) -> dict[int, Regret]:
    run = rows[0].run
    assert run is not None
    size, batch = run.plan.world_size, run.plan.global_batch
    problem = Problem(run.workload, batch, run.topology, size, execution=_way(run), what_if=True, exact=True)
    try:
        own = search(problem, remembering_time(calibration), top=1).winner
    except Refusal as refusal:
        return {each.row: Regret(None, None, str(refusal)) for each in rows}
    return {each.row: Regret(own.label, own.time.step_s / each.step_s - 1) for each in rows if each.step_s}
