"""Measurements of this machine: constants come out of timed trainings, are kept whole or not at all, and are used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from kernels.toolchain import cache as native
from launch import calibrate as command
from launch import calibration_runs
from launch.calibration_fit import constants, described, fitted, link
from launch.calibration_runs import Timed, finished, trainings, write_store
from parallel.planning.hardware import this_machine as machine
from parallel.planning.hardware.collectives import Span, all_gather_s
from parallel.planning.hardware.probe import cpu_topology
from parallel.planning.hardware.this_machine import Measured
from parallel.planning.plan import ParallelPlan
from parallel.planning.timing.calibration import Calibration
from parallel.planning.timing.fit import Observed, Runs
from parallel.planning.timing.work import WorkTable
from parallel.planning.topology import HardwareTopology, load_hardware
from pretrain import events, forecast
from pretrain.config import RunConfig, load
from pretrain.machine import Machine
from pretrain.run import World, _begin, decide, main, validate
from pretrain.rundir import begin
from pretrain.step_probe import GATHERED, Figures
from stoker.errors import Refusal
from tests.launch.tiny import tiny
from tests.parity.pool import Pool

MACHINE = cpu_topology(2, 16e9, "Test processor")
FIGURES = {
    1: Figures({"float32": 2e11, "float64": 1e11, "bfloat16": 1e12}, 1.2e10, 2e-6, {}),
    2: Figures(
        {"float32": 1.5e11, "float64": 8e10, "bfloat16": 8e11},
        9e9,
        2e-6,
        {size: 1e-4 + size / 1e9 for size in GATHERED},
    ),
}
HARDWARE = {ranks: described(MACHINE, figures, ranks, 3 - ranks) for ranks, figures in FIGURES.items()}
#: Trainings that are enough to see the command at work.
SHORT = ("attention+dense 32, 1 x 64, 1 rank", "attention+dense 160, 8 x 128, 2 ranks, pp 2")
#: Presets that train on a CPU.
PRESETS = ("demo", "tiny-dense")
#: Constants of a made-up machine, each off its prior.
TRUTH = {
    "product": 0.55,
    "attention": 0.3,
    "linear": 0.45,
    "memory": 0.7,
    "kernel_gap_s": 3e-5,
    "links": 0.4,
    "step_s": 0.02,
}


@given(bandwidth=st.floats(5e8, 5e11), latency_s=st.floats(1e-6, 5e-4), ranks=st.sampled_from([2, 3, 8]))
def test_bandwidth_and_latency_come_out_of_timed_gathers(bandwidth: float, latency_s: float, ranks: int) -> None:
    domain = replace(MACHINE.domain, bandwidth=bandwidth, latency_s=latency_s)
    told = {
        size: float(all_gather_s(size, Span(ranks, ranks), replace(MACHINE, domain=domain)))
        for size in (2**8, *GATHERED, 2**30)
    }
    found_bandwidth, found_latency_s = link(MACHINE, told, ranks)
    assert math.isclose(found_bandwidth, bandwidth, rel_tol=0.02) and math.isclose(
        found_latency_s, latency_s, rel_tol=0.05
    )


def step_s(config: RunConfig, ranks: int, values: Mapping[str, float]) -> float:
    topology, execution = HARDWARE[ranks], forecast.execution_of(config)
    work = WorkTable(forecast.workload_at(config), execution, topology).step(config.plan(ranks))
    return float(Runs([Observed(work, topology, execution, 1.0)]).predict(values)[0])


def test_constants_fitted_to_timed_trainings_predict_other_models(tmp_path: Path) -> None:
    believed = constants(FIGURES[2], cuda=False)
    truth = {constant.name: TRUTH.get(constant.name, constant.prior) for constant in believed}
    timed = []
    for number, training in enumerate(trainings(2, cuda=False)):
        (folder := tmp_path / str(number)).mkdir()
        config = load(training.write(folder))
        timed.append(Timed(training, config, step_s(config, training.ranks, truth), 0.0))
    found = fitted(timed, HARDWARE, believed)
    measured = [run.step_s for run in timed]
    assert max(abs(found.fitted_s / measured - 1)) < 0.02 and median(abs(found.held_out_s / measured - 1)) < 0.05
    assert 1.0 < max(found.spreads.values()) < 1.15
    for preset in PRESETS:
        for ranks, layout in ((1, "tp=1"), (2, "tp=1"), (2, "tp=2"), (2, "pp=2")):
            config = load(preset, [f"parallel.{layout}"])
            assert math.isclose(step_s(config, ranks, found.values), step_s(config, ranks, truth), rel_tol=0.08)
    slow = [replace(run, step_s=2 * run.step_s) if "moe 96" in run.training.model.name else run for run in timed]
    assert fitted(slow, HARDWARE, believed).spreads["moe"] > 1.15, (
        "an error that the model cannot explain is not hidden"
    )


def test_no_training_is_a_preset_and_each_kind_of_layer_is_in_two(tmp_path: Path) -> None:
    models = {training.model.name: training.model for training in trainings(2, cuda=False)}
    presets = {load(name).model.width for name in PRESETS}
    used = [part for model in models.values() for part in {part for layer in model.layers for part in layer.split("/")}]
    assert not presets & {model.width for model in models.values()}
    assert all(used.count(part) >= 2 for part in ("attention", "gated_delta", "dense", "moe"))
    assert {training.ranks for training in trainings(1, cuda=False)} == {1}


def measurements(**provenance: Any) -> Measured:
    values = {constant.name: constant.prior for constant in constants(FIGURES[2], cuda=False)}
    told = {
        "dtypes": ["float32"],
        "date": "2026-11-23",
        "versions": {"torch": machine._installed("torch")},
        **provenance,
    }
    return Measured(HARDWARE, Calibration(values, {"dense": 1.1, "moe": 1.2}, told))


def test_measurements_are_read_back_as_they_were_kept(tmp_path: Path) -> None:
    machine.save(tmp_path, measurements())
    machine.save(tmp_path, measurements(date="2027-01-01"))
    read = machine.load(tmp_path)
    assert (
        read is not None and read.hardware == HARDWARE and read.calibration.values == measurements().calibration.values
    )
    assert read.known(2, "float32").basis == "measured on this machine, 2027-01-01"
    assert read.known(1, "float32").topology.device.processors == 2
    assert len(list(tmp_path.iterdir())) == 3, "what stood before is gone"


def test_an_interrupted_save_leaves_what_stood_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.save(tmp_path, measurements())
    save_hardware = machine.save_hardware
    for moment in range(2):
        calls: Iterator[int] = iter(range(3))

        def interrupted(path: Path, topology: HardwareTopology, calls: Iterator[int] = calls, at: int = moment) -> None:
            save_hardware(path, topology)
            if next(calls) == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(machine, "save_hardware", interrupted)
        with pytest.raises(KeyboardInterrupt):
            machine.save(tmp_path, measurements(date="2027-01-01"))
        read = machine.load(tmp_path)
        assert read is not None and read.calibration.provenance["date"] == "2026-11-23" and read.hardware == HARDWARE
    monkeypatch.undo()
    machine.save(tmp_path, measurements())
    assert len(list(tmp_path.iterdir())) == 3


DAMAGE = {
    "no JSON": lambda text: text[:-20],
    "no values": lambda text: text.replace('"values"', '"valves"'),
    "a newer format": lambda text: text.replace('"version": 1', '"version": 99'),
    "other constants": lambda text: text.replace('"kernel_gap_s"', '"kernel_host_s"'),
    "a hardware file is gone": lambda text: text.replace(".yaml", ".yml"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_measurements_are_refused_by_name_and_a_run_goes_on_without(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = machine.save(tmp_path, measurements())
    path.write_text(DAMAGE[how](path.read_text()))
    with pytest.raises(Refusal, match=rf"{path}: .*`stoker plan calibrate`"):
        machine.load(tmp_path)
    monkeypatch.setattr(machine, "place", lambda topology: tmp_path)
    said: list[str] = []
    plan = load("tiny-dense").plan(2, said.append)
    assert plan.dp == 2 and str(path) in said[0]


@pytest.mark.parametrize(
    ("ranks", "dtype", "threads", "says"),
    [
        (3, "float32", None, "3 ranks would take turns on this machine, which was measured for up to 2"),
        (2, "bfloat16", None, "measured in float32, and the run is in bfloat16"),
        (2, "float32", "7", "ranks have 7 threads"),
    ],
)
def test_p7_what_was_not_measured_is_unknown(
    ranks: int, dtype: str, threads: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "load", lambda folder: measurements())
    monkeypatch.setenv("OMP_NUM_THREADS", threads or "1")
    config = load("tiny-dense", ["train.global_batch=24", f"run.dtype={dtype}", "parallel.tp=1"])
    with pytest.raises(Refusal, match=says.replace("(", r"\(")):
        forecast.forecast(config, config.plan(ranks))


def test_a_prediction_says_so_where_torch_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "with torch 2.1" in measurements(versions={"torch": "2.1"}).known(2, "float32").basis


def test_auto_takes_the_fastest_of_what_the_machine_was_measured_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every layout of two ranks, judged one by one."""
    monkeypatch.setattr(machine, "load", lambda folder: measurements())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for preset in PRESETS:
        said: list[str] = []
        chosen = load(preset).plan(2, said.append)
        assert len(said) == 1 and "parallel: auto takes" in said[0] and "measured on this machine" in said[0]
        each = []
        for layout in ("dp", "tp=2", "tp=2,sequence_parallel=true", "pp=2", "ep=2"):
            overrides = ["parallel.tp=1", *(f"parallel.{axis}" for axis in layout.split(",") if "=" in axis)]
            config = load(preset, overrides)
            if "ep" not in layout or config.model.moe is not None:
                each.append(forecast.forecast(config, config.plan(2)).time.step_s)
        assert math.isclose(forecast.forecast(load(preset), chosen).time.step_s, min(each), rel_tol=1e-6)


def test_a_run_with_checkpoints_keeps_the_layout_that_auto_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(tiny(tmp_path), ["parallel=auto", "checkpoint.every=1"])
    chosen = ParallelPlan(2, 12, 1, tp=2, num_layers=3)
    monkeypatch.setattr(RunConfig, "plan", lambda self, ranks, announce=print: ParallelPlan(ranks, 12, 1, num_layers=3))
    start = validate(config, World(0, 2, 0))
    assert start is not None
    begin(start, config, chosen).close()
    said: list[str] = []
    assert decide(config, 2, said.append).tp == 1, "nothing was trained under it"
    folder = config.run_dir / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "COMMIT").write_text("{}")
    assert decide(config, 2, said.append) == chosen and "keeps the layout" in said[-1]
    assert decide(config, 3).tp == 1 and decide(load(tmp_path / "tiny.yaml", ["parallel.ep=2"]), 2).tp == 1
    assert decide(load(tmp_path / "tiny.yaml", ["parallel=auto", "train.micro_batch=2"]), 2).tp == 1


def decided_by_one(source: str) -> dict[str, Any]:
    """A rank whose host would choose by its own measurements."""
    rank = dist.get_rank()
    own = ParallelPlan(2, 12, 1, num_layers=3, tp=2 if rank == 0 else 1)
    config, world = load(source, ["parallel=auto"]), World(rank, 2, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunConfig, "plan", lambda self, ranks, announce=print: own)
        patch.setattr(forecast, "here", lambda: load_hardware("cpu"))
        attempt, begun = _begin(config, world, validate(config, world, lambda text: None))
    if attempt is not None:
        attempt.close()
    return begun.plan.to_dict()


def test_ranks_that_would_choose_differently_run_under_rank_zeros_layout(pool: Pool, tmp_path: Path) -> None:
    zero, one = pool.run(2, decided_by_one, str(tiny(tmp_path)))
    assert zero == one and zero["tp"] == 2
    kept = json.loads((tmp_path / "runs/tiny/plan.json").read_text())
    assert kept["plan"]["tp"] == 2
    assert Machine.from_dict(kept["predictions"]["machine"]).topology.device.name, "a report may be made elsewhere"


def test_calibrate_measures_trains_keeps_and_the_trainer_writes_predicted_beside_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command itself, with two trainings; then a run of another shape."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "native").symlink_to(native.folder())  # kernels are not compiled anew
    monkeypatch.setenv("STOKER_CACHE", str(cache))
    short = [run for run in trainings(2, cuda=False) if str(run) in SHORT]
    monkeypatch.setattr(command, "trainings", lambda ranks, cuda: short)
    monkeypatch.setattr(command, "ROUNDS", 1)
    monkeypatch.setattr(command, "LONGEST_S", 0.0)
    monkeypatch.setattr(calibration_runs, "STEPS", 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    said: list[str] = []
    measured = command.calibrate(said.append)
    assert measured.hardware[1].peak("float32") > 1e9 and measured.hardware[2].known("domain.bandwidth") > 1e6
    assert all(any(line.strip().startswith(run) for line in said) for run in SHORT), said
    assert str(cache) in said[-1]

    write_store(tmp_path)
    training = next(run for run in trainings(2, cuda=False) if "dense 256" in run.model.name)
    (folder := tmp_path / "run").mkdir()
    path = training.write(folder)
    try:
        assert main([str(path), "parallel=auto"]) == 0
    finally:
        torch.use_deterministic_algorithms(False)  # the trainer's process ends with it on
    config, measured_s = finished(path)
    predictions = json.loads((config.run_dir / "plan.json").read_text())["predictions"]
    assert predictions["step_time_low_s"] < predictions["step_time_s"] < predictions["step_time_high_s"]
    assert 0.1 < predictions["step_time_s"] / measured_s < 10  # how near it comes, cpu_accuracy.py measures
    printed = capfd.readouterr().out
    assert "parallel: auto takes" in printed and "step time: predicted" in printed
    assert all(0 < (event.timing.mfu or 0) < 1 for event in events.read(config.run_dir))
