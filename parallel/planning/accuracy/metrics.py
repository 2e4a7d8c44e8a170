"""How good predictions are: errors, ranks, and what it would cost to follow them. No torch.

Everything takes rows of ``evaluate.py`` and nothing else, so that a reader can check each figure by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any, TypeVar

import numpy as np

from parallel.planning.accuracy.evaluate import Judged

#: Runs that differ by less are not ranked against each other: repeated runs of one layout differ by as much
#: (planner.md section 0: a median of 5.9 % over containers).
TIED = 0.05
#: An error below this counts as good.
GOOD = 0.15
#: Runs of a group from which on their ranks say something.
FEWEST = 4

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Errors:
    """Of ``count`` relative errors, their sizes: shares of the published value; ``good``: the share below 15 %;
    ``bias``: the median with its sign."""

    count: int
    median: float
    mean: float
    maximum: float
    good: float
    bias: float

    @classmethod
    def of(cls, errors: Iterable[float | None]) -> Errors | None:
        """None where there is nothing to compare."""
        signed = [error for error in errors if error is not None]
        if not signed:
            return None
        sizes = [abs(error) for error in signed]
        good = sum(size < GOOD for size in sizes) / len(sizes)
        return cls(len(sizes), median(sizes), mean(sizes), max(sizes), good, median(signed))


def grouped(judged: Iterable[Judged], key: Callable[[Judged], Key]) -> dict[Key, list[Judged]]:
    """Rows that have a run, by ``key``, in order of appearance."""
    groups: dict[Key, list[Judged]] = {}
    for each in judged:
        if each.run is not None:
            groups.setdefault(key(each), []).append(each)
    return groups


def stated(judged: Iterable[Judged]) -> list[Judged]:
    """Sound rows that give their whole layout."""
    return [each for each in judged if each.sound and each.run and each.run.stated]


def timed(judged: Iterable[Judged]) -> list[Judged]:
    """Sound rows whose predicted and published step times can be compared."""
    return [each for each in judged if each.sound and each.time_error is not None]


def coverage(judged: Sequence[Judged]) -> float:
    """Share of rows that could be modelled."""
    return sum(each.skipped is None for each in judged) / len(judged) if judged else 0.0


def rank_correlation(predicted: Sequence[float], published: Sequence[float], tied: float = TIED) -> float | None:
    """Spearman's correlation without the pairs whose published values differ by less than ``tied``; None without pairs.

    Spearman's coefficient is a sum over pairs of the product of their differences in rank, each divided by its norm
    (Daniels 1944, Biometrika 33, "The relation between measures of correlation"): pairs may be left out of all three
    sums. With every pair kept it is Spearman's.
    """
    x, y = _ranks(predicted), _ranks(published)
    values = np.asarray(published, dtype=float)
    first, second = np.triu_indices(len(values), 1)
    apart = np.maximum(values[first], values[second]) >= (1 + tied) * np.minimum(values[first], values[second])
    first, second = first[apart], second[apart]
    by_x, by_y = x[first] - x[second], y[first] - y[second]
    norm = np.sqrt((by_x @ by_x) * (by_y @ by_y))
    return float(by_x @ by_y / norm) if norm else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    """From 1, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


@dataclass(frozen=True)
class Ranking:
    runs: int
    correlation: float


def rankings(judged: Iterable[Judged], key: Callable[[Judged], Key], fewest: int = FEWEST) -> dict[Key, Ranking]:
    """Rank correlation of predicted and published tokens/s per device in each group of at least ``fewest`` runs."""
    found = {}
    for name, runs in grouped(timed(judged), key).items():
        predicted = [each.predicted.tokens_per_s_per_gpu or 0.0 for each in runs]
        measured = [each.measured.tokens_per_s_per_gpu or 0.0 for each in runs]
        correlation = rank_correlation(predicted, measured) if len(runs) >= fewest else None
        if correlation is not None:
            found[name] = Ranking(len(runs), correlation)
    return found


Case = tuple[str, str, int, str, int, int]


def case(judged: Judged) -> Case:
    """What a layout is chosen for: (model, gpu, number of them, precision, tokens a window, windows a step)."""
    run = judged.run
    assert run is not None
    machine = judged.tag("gpu"), run.plan.world_size, run.execution.precision
    return judged.tag("model"), *machine, run.workload.seq_len, run.plan.global_batch


def case_of_release(judged: Judged) -> tuple[Any, ...]:
    """The same, among runs of one source under one release of its software."""
    assert judged.run is not None
    return *case(judged), judged.tag("source"), judged.run.execution.generation


@dataclass(frozen=True)
class Choice:
    """Of ``layouts`` published ones of a case, the row that the prediction prefers, the row that was fastest, and the
    throughput of the former over that of the latter."""

    layouts: int
    picked: int
    best: int
    kept: float


def choices(judged: Iterable[Judged], key: Callable[[Judged], Any] = case) -> dict[Any, Choice]:
    """For each case with several published layouts: how much of the best throughput our pick of them has.

    A layout that was run under several releases of the software is taken at its best in both respects.
    """
    found = {}
    for name, runs in grouped(timed(judged), key).items():
        layouts: dict[Any, list[Judged]] = {}
        for each in runs:
            assert each.run is not None
            layouts.setdefault((each.run.plan, replace(each.run.execution, generation=(0, 0))), []).append(each)
        if len(layouts) < 2:
            continue
        picked = min(layouts.values(), key=lambda same: min(each.step_s or 0.0 for each in same))
        fastest = [min(same, key=lambda each: each.measured.step_time_s or 0.0) for same in (picked, runs)]
        ours, best = (each.measured.step_time_s or 0.0 for each in fastest)
        found[name] = Choice(len(layouts), fastest[0].row, fastest[1].row, best / ours)
    return found


def noise(judged: Iterable[Judged]) -> list[float]:
    """How far runs of one layout on one machine and one release of the software lie apart: slowest over fastest, less
    one, of each set of rows that a model cannot tell apart. No prediction is better than this."""
    same: dict[Any, list[float]] = {}
    for each in judged:
        if each.run and (step_s := each.measured.step_time_s):
            run = each.run
            same.setdefault((id(run.workload), run.plan, run.execution, run.topology), []).append(step_s)
    return [max(times) / min(times) - 1 for times in same.values() if len(times) > 1]
