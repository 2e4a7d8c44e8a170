"""How accurate the planner is, measured: ``python -m parallel.planning.accuracy [--fit] [--out FILE]``. No torch.

Every published run is predicted four times: by constants fitted to all runs, to those of other publications, to those
again without the publication's name, and to those on other kinds of GPU. Two runs of the command write the same bytes.
``--fit`` also makes the constants that come with Stoker (``calibration.json``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from parallel.planning.accuracy.evaluate import Judged, fitting, observed, read, read_nameless, tokens_per_s_per_gpu
from parallel.planning.accuracy.metrics import Errors, timed
from parallel.planning.accuracy.regret import Regret, regrets
from parallel.planning.published.rows import TABLE, read_rows
from parallel.planning.timing import calibration
from parallel.planning.timing.calibration import Calibration
from parallel.planning.timing.fit import Observed, Runs, fit
from stoker import canonical, formats
from stoker.files import write_atomic
from stoker.progress import track
from stoker.version import code_commit

PAGE = Path("docs/planner-accuracy.md")
#: An error bar holds so many of the held-out runs.
HELD = 0.8
#: Significant digits of a fitted constant that are written down: what a fit on another processor agrees on.
DIGITS = 5

Fit = Callable[[Sequence[Observed]], dict[str, float]]


@dataclass(frozen=True)
class Accuracy:
    """Rows of the table, each predicted by constants fitted to all runs (``fitted``), to those of other publications
    (``by_source``; ``nameless``: and read without the publication's name) and to those on other kinds of GPU
    (``by_gpu``), kinds of one chip held out together (``by_chip``).
    ``calibration``: the first of these, with error bars from the second. ``regrets``: of the planner's own layouts, by
    row."""

    fitted: list[Judged]
    by_source: list[Judged]
    nameless: list[Judged]
    by_gpu: list[Judged]
    by_chip: list[Judged]
    calibration: Calibration
    regrets: Mapping[int, Regret]

    @property
    def views(self) -> dict[str, list[Judged]]:
        return {
            "fitted to all": self.fitted,
            "source held out": self.by_source,
            "source unknown": self.nameless,
            "GPU held out": self.by_gpu,
        }


def publication(judged: Judged) -> str:
    """The publication that a row's source is a table of: "MLPerf Training v5.1" of all its submitters."""
    return re.sub(r" \(.*| tables? .*", "", judged.tag("source"))


def gpu_kind(judged: Judged) -> str:
    """A kind of GPU, as the table tells them apart: "A100-40GB" is another than "A100"."""
    return judged.tag("gpu")


def chip(judged: Judged) -> str:
    """ "A100" of "A100-40GB"."""
    return judged.tag("gpu").split("-")[0]


def measure(
    judged: Sequence[Judged],
    nameless: Sequence[Judged],
    fit: Fit = fit,
    search: bool = True,
    date: str | None = None,
) -> Accuracy:
    """Fit, hold out and predict. ``nameless``: the same rows by ``read_nameless``. ``search``: also what the planner
    would have run instead of each row (minutes). ``date``: for the provenance."""
    named, unnamed = _Works(judged), _Works(nameless)

    def fit_to(rows: Iterable[Judged]) -> dict[str, float]:
        return {name: _rounded(value) for name, value in fit(named.observed(fitting(rows))).items()}

    def held_out(key: Callable[[Judged], str], groups: Iterable[str]) -> dict[str, dict[str, float]]:
        """The constants without each group."""
        names = track(list(groups), "fits with a group held out")
        return {name: fit_to(each for each in named.modelled if key(each) != name) for name in names}

    by_publication = held_out(publication, dict.fromkeys(map(publication, named.modelled)))
    by_source, by_nobody = (each.predicted(publication, by_publication) for each in (named, unnamed))
    by_gpu = named.predicted(gpu_kind, held_out(gpu_kind, dict.fromkeys(map(gpu_kind, named.modelled))))
    siblings = sorted({chip(each) for each in named.modelled if chip(each) != gpu_kind(each)})
    by_chip = _in_place(by_gpu, named.predicted(chip, held_out(chip, siblings)))
    values = fit_to(named.modelled)
    fitted = named.predicted(lambda each: "", {"": values})
    found = Calibration(values, _spreads(by_source), _provenance(fitting(named.modelled), date))
    return Accuracy(fitted, by_source, by_nobody, by_gpu, by_chip, found, regrets(fitted, found) if search else {})


class _Works:
    """The work of every row that has a run, for any constants."""

    def __init__(self, judged: Sequence[Judged]) -> None:
        self.judged = judged
        self.modelled = [each for each in judged if each.run is not None]
        self._work = dict(zip((each.row for each in self.modelled), observed(self.modelled), strict=True))

    def observed(self, rows: Iterable[Judged]) -> list[Observed]:
        return [self._work[each.row] for each in rows]

    def predicted(self, key: Callable[[Judged], str], values: Mapping[str, Mapping[str, float]]) -> list[Judged]:
        """Every row, those of the groups by ``key`` predicted with these values."""
        found = {each.row: each for each in self.judged}
        for name, of_group in values.items():
            if theirs := [each for each in self.modelled if key(each) == name]:
                step_s = Runs(self.observed(theirs)).predict(of_group).tolist()
                found |= {each.row: replace(each, step_s=s) for each, s in zip(theirs, step_s, strict=True)}
        return list(found.values())


def _in_place(judged: Sequence[Judged], others: Sequence[Judged]) -> list[Judged]:
    """The rows, with those of ``others`` that are predicted in their place."""
    predicted = {each.row: each for each in others if each.step_s is not None}
    return [predicted.get(each.row, each) for each in judged]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _spreads(held_out: Sequence[Judged]) -> dict[str, float]:
    """By kind of model, the factor that four of five held-out runs lie within, over or under."""
    found = {}
    for kind in ("dense", "moe"):
        errors = [each.time_error for each in timed(held_out) if each.tag("kind") == kind]
        factors = [np.exp(abs(np.log1p(error))) for error in errors if error is not None]
        found[kind] = float(f"{np.quantile(factors, HELD):.4g}") if factors else float("inf")
    return found


def _provenance(fitted: Sequence[Judged], date: str | None) -> dict[str, Any]:
    """What the constants were fitted to; no clock is read, so that the same rows give the same bytes."""
    return {
        "table": TABLE.name,
        "table_sha256": hashlib.sha256(TABLE.read_bytes()).hexdigest(),
        "rows": len(fitted),
        "publications": len({publication(each) for each in fitted}),
        "code_commit": code_commit(),
        "date": date,
    }


def baselines(judged: Sequence[Judged]) -> dict[str, Errors]:
    """What a planner has to beat: the median throughput in model FLOP/s of a class of runs, for every run of the class,
    which knows the answers. By kind of model, classes (gpu, precision, kind)."""
    runs = timed(judged)

    def rate(each: Judged) -> float:
        assert each.run is not None
        per_token = each.run.workload.training_flops
        return per_token * tokens_per_s_per_gpu(each.run, each.measured.step_time_s or math.nan)

    classes: dict[tuple[str, ...], list[float]] = {}
    for each in runs:
        classes.setdefault(_class(each), []).append(rate(each))
    errors: dict[str, list[float]] = {}
    for each in runs:  # step times are as the inverse of rates
        errors.setdefault(each.tag("kind"), []).append(rate(each) / float(np.median(classes[_class(each)])) - 1)
    return {kind: found for kind, values in errors.items() if (found := Errors.of(values))}


def _class(judged: Judged) -> tuple[str, ...]:
    return judged.tag("gpu"), judged.precision, judged.tag("kind")


def save(found: Calibration, path: Path) -> None:
    """Write a calibration as ``load_calibration`` reads it."""
    stored = {
        "format": formats.stamp(calibration.FORMAT, calibration.VERSION),
        "values": dict(found.values),
        "spreads": dict(found.spreads),
        "provenance": dict(found.provenance),
    }
    canonical.dumps(stored)  # refuses what is not a finite number
    write_atomic(path, json.dumps(stored, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    from parallel.planning.accuracy.page import page

    parser = argparse.ArgumentParser(prog="python -m parallel.planning.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--fit", action="store_true", help="also write calibration.json")
    parser.add_argument("--out", type=Path, default=PAGE, help="where the page goes")
    parser.add_argument("--date", help="to be written into the provenance; no clock is read")
    options = parser.parse_args(arguments)
    rows = read_rows()
    judged = read(rows)
    found = measure(judged, read_nameless(rows, judged), date=options.date)
    if options.fit:
        save(found.calibration, Path(str(files("parallel.planning.timing"))) / "calibration.json")
    write_atomic(options.out, page(found))
    print(options.out)
