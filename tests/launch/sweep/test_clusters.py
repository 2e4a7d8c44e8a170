"""A sweep on a real Slurm of virtual nodes, and on a real Ray of this machine."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.sweep.history import Outcome, state
from launch.sweep.run import sweep
from launch.sweep.scheduler import Scheduler
from pretrain import events
from pretrain.rundir import committed_steps
from stoker.errors import Refusal
from tests.launch.launching.slurm_cluster import Cluster
from tests.launch.sweep.sweeps import planned, until, write
from tests.launch.sweep.trainers import no_op


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_slurm_runs_what_is_left_as_tasks_of_an_array(tmp_path: Path, cluster: Cluster) -> None:
    keys = {"base": {"run.steps": 4}, "grid": {"train.lr": [1e-2, 1e-3], "train.clip": [1.0, 0.5]}}
    ledger = planned(tmp_path, **keys)
    for trial in ledger.trials[:2]:
        assert no_op(ledger.arguments(trial)) == 0
    said = sweep(tmp_path / "sweep.yaml", 1, "slurm")
    assert isinstance(said, str) and ": 2 runs of" in said and ", 1 at a time" in said
    left = ledger.trials[2:]
    until(lambda: all(state(ledger, trial).outcome.over for trial in left), "both runs are done")
    assert {state(ledger, trial).outcome for trial in left} == {Outcome.DONE}
    assert [len(events.read(ledger.run_dir(trial))) for trial in left] == [4, 4]
    assert '"event":"start"' in ledger.history(left[0]).read_text()
    again = sweep(tmp_path / "sweep.yaml", 1, "slurm")
    assert isinstance(again, str) and again.endswith("nothing is left to run")


def test_slurm_refuses_a_rule_that_no_task_could_follow(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="stop: the rule is decided by one process"):
        sweep(write(tmp_path, seeds=2, stop={"first": 2}), 1, "slurm")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'stoker[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.timeout(600)
def test_ray_runs_a_sweep_and_hands_on_that_it_is_to_end(tmp_path: Path, ray: Any) -> None:
    from launch.sweep.on_ray import RaySlots

    ledger = planned(tmp_path, base={"run.steps": 4}, grid={"train.lr": [1e-2, 1e-3]})
    slots = RaySlots(ledger)
    assert slots.count == 2
    found = Scheduler(ledger, slots, announce=lambda text: None).run()
    assert found.counts == {Outcome.DONE: 2}, [ledger.log(trial).read_text()[-1000:] for trial in ledger.trials]

    longer = planned(tmp_path, name="long", base={"run.steps": 100_000}, seeds=[3])
    (trial,) = longer.trials

    def ask() -> None:
        until(lambda: (longer.run_dir(trial) / events.METRICS).exists(), "it trains")
        os.kill(os.getpid(), 15)

    thread = threading.Thread(target=ask)
    thread.start()
    asked = Scheduler(longer, RaySlots(longer), announce=lambda text: None).run()
    thread.join()
    assert asked.states[1].outcome is Outcome.PREEMPTED and asked.code == 4
    assert committed_steps(longer.run_dir(trial)), "it has saved"


def test_ray_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.sweep.on_ray import RaySlots

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Refusal, match="Ray is not installed"):
        RaySlots(planned(tmp_path))
