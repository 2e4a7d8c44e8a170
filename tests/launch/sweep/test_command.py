"""``stoker sweep`` as a person gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launch.commands_sweep import sweep
from launch.sweep.ledger import read
from launch.sweep.run import default_jobs, open_slots, prepare
from launch.sweep.slots import ProcessSlots
from stoker.errors import Refusal
from tests.launch.sweep.sweeps import planned, write
from tests.launch.sweep.trainers import no_op

APP = typer.Typer()
APP.command()(sweep)


def test_a_dry_run_lists_every_run_and_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, grid={"train.lr": [1e-2, 1e-3]})
    done = CliRunner().invoke(APP, [str(path), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "0001  waiting               train.lr=0.01" in done.output and "2 runs of 1 ranks (2 waiting)" in done.output
    assert not (tmp_path / "runs").exists()


def test_a_refusal_is_the_commands_and_writes_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(APP, [str(write(tmp_path, grid={"train.rl": [1]}))])
    assert isinstance(done.exception, Refusal) and not (tmp_path / "runs").exists()


def test_a_finished_sweep_prints_its_table_and_where_the_page_is(tmp_path: Path) -> None:
    ledger = planned(tmp_path, grid={"train.lr": [1e-2, 0.5]})
    for trial in ledger.trials:
        no_op(ledger.arguments(trial))
    done = CliRunner().invoke(APP, [str(tmp_path / "sweep.yaml")])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "loss, lowest first" and lines[1].startswith(ledger.trials[0].name)
    assert "2 done" in lines[-2] and Path(lines[-1]).read_text().startswith("<!doctype html>")


def test_the_threads_of_a_sweep_are_decided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    path = write(tmp_path)
    prepare(path).write()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert prepare(path).threads == 3 == read(tmp_path / "runs" / "sweep").threads


def test_with_gpus_each_slot_has_its_own_and_too_many_runs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.sweep.run.cuda_devices", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,3,5,7")
    ledger = planned(tmp_path, ranks=2, seeds=2)
    assert default_jobs(2) == 2
    slots = open_slots(ledger)
    assert isinstance(slots, ProcessSlots) and slots.count == 2 and slots.devices == [["0", "2"], ["3", "5"]]
    with pytest.raises(Refusal, match="3 runs of 2 ranks need 6 devices, and this machine has 5: --jobs 2"):
        open_slots(ledger, 3)
