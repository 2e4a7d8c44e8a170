"""The time model explains a CPU: constants fitted to recorded trainings predict recorded runs of other models.

``cpu_steps.json`` holds the trainings of ``stoker plan calibrate`` and the cases of ``cpu_accuracy``, each timed while
other processes had less than a tenth of that machine's cores; ``cpu_accuracy.py`` measures them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from launch.calibration_fit import constants, described, fitted
from launch.calibration_runs import Timed, trainings
from parallel.planning.hardware.probe import cpu_topology
from parallel.planning.timing.fit import Observed, Runs
from parallel.planning.timing.work import WorkTable
from pretrain.config import load
from pretrain.forecast import execution_of, workload_at
from pretrain.step_probe import Figures
from tests.planning.cpu_accuracy import LARGEST, MEDIAN, cases

RECORDED = json.loads((Path(__file__).parent / "cpu_steps.json").read_text())


def test_a_cpu_is_predicted_within_the_bounds_from_trainings_of_other_models(tmp_path: Path) -> None:
    figures = {
        int(ranks): Figures(
            f["flops"], f["copy"], f["operation_s"], {int(size): s for size, s in f["gather_s"].items()}
        )
        for ranks, f in RECORDED["figures"].items()
    }
    machine = cpu_topology(2, 24e9, "recorded")
    hardware = {ranks: described(machine, found, ranks, 2 // ranks) for ranks, found in figures.items()}
    timed = []
    for number, training in enumerate(trainings(2, cuda=False)):
        (folder := tmp_path / str(number)).mkdir()
        timed.append(Timed(training, load(training.write(folder)), RECORDED["trainings"][str(training)], 0.0))
    found = fitted(timed, hardware, constants(figures[2], cuda=False))
    errors = {}
    for case in cases(tmp_path):
        config = load(case.source, case.overrides(tmp_path))
        topology, execution = hardware[case.ranks], execution_of(config)
        work = WorkTable(workload_at(config), execution, topology).step(config.plan(case.ranks))
        predicted_s = Runs([Observed(work, topology, execution, 1.0)]).predict(found.values)[0]
        errors[str(case)] = abs(predicted_s / RECORDED["cases"][str(case)] - 1)
    assert len(errors) == 17 and median(errors.values()) < MEDIAN and max(errors.values()) < LARGEST, errors
    print(f"median {median(errors.values()):.1%}, largest {max(errors.values()):.1%}; spreads {found.spreads}")
