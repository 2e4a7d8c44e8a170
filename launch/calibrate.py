"""``stoker plan calibrate``: what this machine can do, and what the trainer makes of it.

Ranks measure products, copies and collectives, which become hardware files; then they train small models under a few
layouts, each twice, in turns; the planner's constants are fitted to the times of their steps, and judged on models
that were left out of the fit. All of it is kept for this machine (``parallel/planning/hardware/this_machine.py``), or
nothing is.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from launch.calibration_fit import Fitted, constants, described, fitted
from launch.calibration_runs import Timed, Training, finished, trainings, write_store
from launch.machine import cores, cuda_devices, rank_environment
from parallel.planning.hardware import this_machine as machine
from parallel.planning.hardware.this_machine import Measured
from parallel.planning.timing.calibration import Calibration
from pretrain.step_probe import Figures, Ranks
from stoker.progress import progress
from stoker.version import VERSION, code_commit

#: Ranks that share the machine while its figures are measured, and the most that train.
COUNTS, TRAINING_RANKS = (1, 2, 4, 8), 2
#: Rounds of trainings. What else a machine does only slows it down: of a training's rounds the fastest counts.
ROUNDS = 2
#: Share of the cores that others may take while a training runs; beyond, it runs once more.
OTHERS = 0.08
#: Seconds after which no training runs again.
LONGEST_S = 150.0


def calibrate(announce: Callable[[str], None] = print) -> Measured:
    """Measure this machine, fit, and keep what was found; ``announce`` is told, line by line."""
    began, devices, topology = time.monotonic(), cuda_devices(), machine.here()
    counts = [count for count in COUNTS if count <= (devices or cores())]
    runs = trainings(min(max(counts), TRAINING_RANKS), devices > 0)
    announce(f"measuring {topology.device.name}: {len(runs)} short trainings, in about three minutes")
    environment = rank_environment(cores(), devices > 0, deterministic=True)
    with tempfile.TemporaryDirectory(prefix="stoker-calibrate-") as scratch:
        folder = Path(scratch)
        write_store(folder)
        with (
            progress("calibrating", ROUNDS * len(runs)) as advance,
            Ranks(max(counts), environment, folder / "ranks.log") as ranks,
        ):
            figures = {count: ranks.measure(count, _threads(count)) for count in counts}
            timed = _train(ranks, runs, folder, began, lambda: advance(1))
            figures = {count: found.best(ranks.measure(count, _threads(count))) for count, found in figures.items()}
    hardware = {count: described(topology, found, count, _threads(count)) for count, found in figures.items()}
    found = fitted(timed, hardware, constants(figures[max(counts)], devices > 0))
    calibration = Calibration(found.values, found.spreads, _provenance(topology.device.name, timed, found))
    measured = Measured(hardware, calibration)
    path = machine.save(machine.place(topology), measured)
    for line in (*_figures_told(figures), *_runs_told(timed, found)):
        announce(line)
    announce(f"kept in {path}, after {time.monotonic() - began:.0f} s")
    return measured


def _provenance(device: str, timed: Sequence[Timed], found: Fitted) -> dict[str, Any]:
    runs = [
        {
            "run": str(run.training),
            "step_time_s": run.step_s,
            "fitted_s": float(fitted_s),
            "held_out_s": float(held_out_s),
            "others": run.others,
        }
        for run, fitted_s, held_out_s in zip(timed, found.fitted_s, found.held_out_s, strict=True)
    ]
    return {
        "device": device,
        "cores": cores(),
        "date": date.today().isoformat(),
        "commit": code_commit(),
        "versions": {"stoker": VERSION, "torch": metadata.version("torch")},
        "dtypes": sorted({run.training.dtype for run in timed}),
        "runs": runs,
    }


def _figures_told(figures: dict[int, Figures]) -> Iterator[str]:
    yield "ranks at once, of which each reaches: products by dtype, copies, an operation, gathers by bytes"
    for count, found in figures.items():
        flops = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in found.flops.items())
        gathers = "".join(f", {size:,} B {took * 1e6:,.0f} us" for size, took in found.gather_s.items())
        yield f"  {count}: {flops}, copy {found.copy / 1e9:.3g} GB/s, {found.operation_s * 1e6:.2g} us{gathers}"


def _runs_told(timed: Sequence[Timed], found: Fitted) -> Iterator[str]:
    yield "seconds a step: measured, fitted, and fitted without this model"
    for run, fitted_s, held_out_s in zip(timed, found.fitted_s, found.held_out_s, strict=True):
        errors = (
            f"{fitted_s:7.4f} {fitted_s / run.step_s - 1:+4.0%} {held_out_s:7.4f} {held_out_s / run.step_s - 1:+4.0%}"
        )
        disturbed = f"  others took {run.others:.0%} of the cores" if run.others > OTHERS else ""
        yield f"  {run.training!s:58} {run.step_s:7.4f} {errors}{disturbed}"
    spread = ", ".join(f"{kind} x{factor:.2f}" for kind, factor in found.spreads.items())
    yield f"four of five predictions should lie within: {spread}"
    if count := sum(run.others > OTHERS for run in timed):
        yield f"{count} of {len(timed)} trainings were disturbed by other work: calibrate again when it is quiet"


def _train(
    ranks: Ranks, runs: Sequence[Training], folder: Path, began: float, advance: Callable[[], None]
) -> list[Timed]:
    """Every training once; while there is time, all of them again, in turns, and then those that others disturbed."""
    best: dict[int, Timed] = {}

    def run(index: int) -> None:
        timed = _timed(ranks, runs[index], folder)
        if index not in best or timed.step_s < best[index].step_s:
            best[index] = timed

    disturbed: list[int] = []
    for number in range(ROUNDS + 1):
        for index in range(len(runs)) if number < ROUNDS else disturbed:
            if number == 0 or time.monotonic() - began < LONGEST_S:
                run(index)
            advance()
        disturbed = [index for index in best if best[index].others > OTHERS]
    return [best[index] for index in range(len(runs))]


def _timed(ranks: Ranks, training: Training, folder: Path) -> Timed:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = training.write(Path(place))
        before, own = _busy_s(), _own_s(ranks.processes)
        started = time.monotonic()
        ranks.train(training.ranks, _threads(training.ranks), [str(path)])
        elapsed = (time.monotonic() - started) * cores()
        others = (_busy_s() - before - (_own_s(ranks.processes) - own)) / elapsed
        config, step_s = finished(path)
        return Timed(training, config, step_s, max(others, 0.0))


def _busy_s() -> float:
    """Seconds that cores of this machine have worked."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))


def _own_s(processes: Sequence[int]) -> float:
    """The same of these processes and of this one."""
    total = sum(os.times()[:2])
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it died, and the job says so
            total += sum(psutil.Process(process).cpu_times()[:2])
    return total


def _threads(ranks: int) -> int:
    """As ``stoker train`` shares the cores out."""
    return max(1, cores() // ranks)
