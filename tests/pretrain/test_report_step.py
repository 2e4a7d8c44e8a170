"""The report's section on a step: predicted beside measured, and what the machine's record allows, no more."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree.ElementTree import Element

import pytest

from parallel.planning.hardware.this_machine import Known
from parallel.planning.plan import ParallelPlan
from parallel.planning.timing.calibration import load_calibration
from parallel.planning.topology import HardwareTopology, load_hardware
from pretrain import forecast, rundir
from pretrain.config import load
from pretrain.events import METRICS, Timing
from pretrain.figures.expected import expected, measured
from pretrain.figures.layout import placement
from pretrain.figures.record import Record, read_record
from pretrain.forecast import execution_of, workload_at
from pretrain.machine import Machine
from pretrain.report import write_report
from stoker.errors import Refusal
from tests.pretrain.test_report import event

H100, NVL72 = load_hardware("h100"), load_hardware("gb200-nvl72")
TITLES = {
    "step": "A step, predicted and measured",
    "timeline": "A step of the pipeline",
    "memory": "Memory by pipeline stage",
    "roofline": "Roofline by layer",
}
PIPELINE = ("parallel.pp=2", "parallel.ep=2")


def cpu(**numbers: float) -> HardwareTopology:
    """A CPU of which only ``numbers`` of its device are known."""
    base = load_hardware("cpu")
    return replace(base, device=replace(base.device, **numbers))  # type: ignore[arg-type]


def run(
    root: Path,
    machine: Machine | None,
    overrides: tuple[str, ...] = (),
    ranks: int = 4,
    steps_s: tuple[float, ...] = (),
    told: Mapping[str, Any] | None = None,
    local: int | None = None,
) -> Path:
    """A run as the trainer leaves it, whose first attempt took 9 s a step under another layout."""
    fixed = ("train.global_batch=16", "train.micro_batch=1", "run.dtype=bfloat16")
    config = load("demo", [f"run.dir={root.parent}", f"run.name={root.name}", *fixed, *overrides])
    predictions = dict(told or {}) | ({} if machine is None else {"machine": machine.to_dict()})
    for number in (1, 2):
        rundir.begin(rundir.Start(root, number, None), config, config.plan(ranks), predictions).close()
    early = [event(step, timing=Timing(9.0)) for step in range(5)]
    late = [event(step + 5, attempt=2, timing=Timing(took)) for step, took in enumerate(steps_s)]
    (root / METRICS).write_text("".join(one.to_line() + "\n" for one in [*early, *late]))
    path = root / "attempts/0002/environment.json"
    found = json.loads(path.read_text())
    found["variables"] = {} if local is None else {"LOCAL_WORLD_SIZE": str(local)}
    path.write_text(json.dumps(found))
    return root


def drawn(record: Record) -> dict[str, Element]:
    """The figures of the section by title."""
    figures = [element for element in expected(record) if element.tag == "figure"]
    return {figure.findtext("figcaption/b") or "": figure for figure in figures}


def words(elements: list[Element]) -> str:
    return re.sub(r"\s+", " ", " ".join(text for element in elements for text in element.itertext()))


def test_a_machine_comes_back_as_it_was_recorded() -> None:
    for topology in (H100, NVL72, cpu(), cpu(memory_bytes=5e9)):
        for calibration in (None, load_calibration()):
            machine = Machine(topology, calibration)
            back = Machine.from_dict(json.loads(json.dumps(machine.to_dict())))
            assert back.topology == topology and hash(back.topology) == hash(topology)
            if calibration is None:
                assert back.calibration is None
            else:
                assert back.calibration is not None and back.calibration.values == calibration.values
                assert back.calibration.spreads == calibration.spreads


#: What is known of the machine, the layout -> the figures of the section.
KNOWN: dict[str, tuple[Machine | None, tuple[str, ...], set[str]]] = {
    "all, pipeline": (Machine(H100, load_calibration()), PIPELINE, set(TITLES)),
    "all, no pipeline": (Machine(H100, load_calibration()), (), set(TITLES) - {"timeline"}),
    "never measured, pipeline": (Machine(cpu()), PIPELINE, {"timeline", "memory"}),
    "never measured": (Machine(cpu()), (), {"memory"}),
    "a calibration without rates": (Machine(cpu(), load_calibration()), (), {"memory"}),
    "not recorded, pipeline": (None, PIPELINE, {"timeline"}),
    "not recorded": (None, (), set()),
}


@pytest.mark.parametrize(("machine", "layout", "shown"), KNOWN.values(), ids=KNOWN)
def test_what_is_not_known_is_left_out_and_said(
    tmp_path: Path, machine: Machine | None, layout: tuple[str, ...], shown: set[str]
) -> None:
    record = read_record(run(tmp_path / "run", machine, layout, steps_s=(0.5, 0.6)))
    assert set(drawn(record)) == {TITLES[name] for name in shown}
    assert ("ot drawn" in words(expected(record))) == ("step" not in shown)


def test_the_step_is_the_recorded_machines_whatever_machine_makes_the_report(tmp_path: Path) -> None:
    from parallel.planning.timing.step_time import predict_time

    calibration = load_calibration()
    for topology in (H100, NVL72):
        root = run(tmp_path / topology.name, Machine(topology, calibration), PIPELINE, steps_s=(0.5,))
        record = read_record(root)
        assert record.config is not None and record.plan is not None
        config = record.config
        time = predict_time(workload_at(config), record.plan, execution_of(config), topology, calibration)
        texts = [text.text for text in drawn(record)[TITLES["step"]].iter("text")]
        assert f"{time.step_s * 1e3:.4g} ms" in texts and "500 ms" in texts
    other = {"step_time_s": 2 * time.step_s, "step_time_low_s": time.low_s, "step_time_high_s": 9.0}
    drifted = read_record(run(tmp_path / "drift", Machine(NVL72, calibration), PIPELINE, told=other))
    assert "Drawn as this release predicts it" in words(expected(drifted))
    assert "Drawn as this release" not in words(expected(record))


def test_only_steps_of_the_layout_that_was_predicted_are_measured(tmp_path: Path) -> None:
    times = (0.4, 0.2, 0.3, 5.0, 0.25)
    found = measured(read_record(run(tmp_path / "run", None, steps_s=times)))
    assert found is not None and found.steps == 5
    assert found.median_s == median(times) and 0.2 <= found.low_s < 0.25 and 0.4 < found.high_s <= 5.0
    single = measured(read_record(run(tmp_path / "single", None, steps_s=(0.7,))))
    assert single is not None and (single.low_s, single.median_s, single.high_s) == (0.7, 0.7, 0.7)
    begun = read_record(run(tmp_path / "begun", None))
    assert measured(begun) is None and "Measured step time unknown" in words(expected(begun))


@pytest.mark.parametrize(
    "damage",
    [[], "x", {"hardware": {}}, {"hardware": 3, "calibration": None}, {"hardware": None, "calibration": {}}],
)
def test_a_damaged_record_of_the_machine_is_named_and_the_rest_is_shown(tmp_path: Path, damage: Any) -> None:
    root = run(tmp_path / "run", None, PIPELINE, told={"machine": damage})
    record = read_record(root)
    assert record.machine is None and any(sentence.startswith("machine: ") for sentence in record.unreadable)
    assert set(drawn(record)) == {TITLES["timeline"]}
    assert write_report(root).stat().st_size > 10_000


def test_constants_of_another_release_are_said_and_not_drawn(tmp_path: Path) -> None:
    known = Machine(H100, load_calibration()).to_dict()
    known["calibration"]["values"] = {"product": 0.5}
    record = read_record(run(tmp_path / "run", Machine.from_dict(known), PIPELINE, steps_s=(0.5,)))
    assert set(drawn(record)) == {TITLES["timeline"], TITLES["memory"]}
    assert "Not drawn: " in words(expected(record))


@pytest.mark.parametrize(
    ("machine", "ranks", "local", "hosts", "of_host"),
    [
        (None, 4, None, 1, 4),  # nothing told: one host
        (None, 4, 2, 2, 2),
        (Machine(cpu()), 8, None, 1, 8),  # processes of a CPU, however many cores it has
        (Machine(cpu()), 8, 4, 2, 4),
        (Machine(H100), 4, 4, 1, 8),  # the half of a host that is idle is drawn
        (Machine(H100), 8, 4, 2, 4),  # two hosts, though one could hold all
        (Machine(H100), 16, 8, 2, 8),
        (Machine(NVL72), 8, 4, 1, 72),
    ],
)
def test_ranks_are_drawn_on_the_hosts_that_ran_them(
    tmp_path: Path, machine: Machine | None, ranks: int, local: int | None, hosts: int, of_host: int
) -> None:
    record = read_record(run(tmp_path / "run", machine, PIPELINE, ranks, local=local))
    assert record.plan is not None
    placed = placement(record, record.plan)
    assert (placed.domains, placed.topology.domain.size) == (hosts, of_host)
    if local is not None:
        assert [placed.domain(rank) for rank in range(ranks)] == [
            rank // local if of_host != 72 else 0 for rank in range(ranks)
        ]


def test_a_world_that_the_planner_would_not_place_is_drawn_by_pipeline_rank(tmp_path: Path) -> None:
    """A tensor group over two hosts: the run did it, the planner refuses it."""
    layout = ("parallel.tp=4", "parallel.sequence_parallel=true", "model.attention.num_kv_heads=4")
    layout += ("model.gated_delta.num_qk_heads=4",)
    root = run(tmp_path / "wide", Machine(H100), layout, 4, local=2)
    text = write_report(root).read_text()
    assert "<b>tp</b>" in text and "groups on" not in text


def test_pictures_of_many_racks_stay_small_and_load_nothing(tmp_path: Path) -> None:
    layout = (*PIPELINE, "train.global_batch=256", "train.micro_batch=1")
    root = run(tmp_path / "racks", Machine(NVL72, load_calibration()), layout, 256, (0.5,), local=4)
    text = write_report(root).read_text()
    assert len(text.encode()) < 1_000_000 and "4 trays" not in text and "18 trays of 4 GB200s" in text
    assert "a spare" in text and not re.findall(r"url\((?!#)|@import|<script|<img|src=", text)
    assert all(f"<b>{title}</b>" in text for title in TITLES.values())


def test_a_layout_without_its_configuration_says_what_is_missing(tmp_path: Path) -> None:
    record = read_record(run(tmp_path / "run", Machine(H100, load_calibration()), PIPELINE))
    for less in (replace(record, config=None), replace(record, plan=None)):
        assert "the step cannot be drawn" in words(expected(less)) and not drawn(less)
    other = ParallelPlan(4, 16, 1, num_layers=99, pp=2)
    assert not drawn(replace(record, plan=other))


def test_a_run_keeps_the_machine_that_it_was_predicted_for_known_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("demo", ["run.dtype=bfloat16"])
    plan = config.plan(1)
    known = Known(H100, load_calibration(), "of a test")
    monkeypatch.setattr(forecast, "this_machine", lambda ranks, dtype: known)
    expectation, kept = forecast.recorded(config, plan)
    assert expectation is not None and kept["step_time_s"] == expectation.time.step_s
    assert Machine.from_dict(json.loads(json.dumps(kept["machine"]))).topology == H100

    def never_measured(ranks: int, dtype: str) -> Known:
        raise Refusal("never measured")

    monkeypatch.setattr(forecast, "this_machine", never_measured)
    monkeypatch.setattr(forecast, "here", lambda: cpu(memory_bytes=4e9))
    assert forecast.recorded(config, plan) == (
        None,
        {"unknown": "never measured", "machine": Machine(cpu(memory_bytes=4e9)).to_dict()},
    )
    monkeypatch.setattr(forecast, "here", lambda: never_measured(1, ""))
    assert forecast.recorded(config, plan) == (None, {"unknown": "never measured"})
