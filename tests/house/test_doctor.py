"""The doctor says what is there, what is not, and what that costs, without importing any of it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch import doctor
from pretrain import guard
from tests.house.sources import HOME


def finding(name: str) -> doctor.Finding:
    (found,) = [found for found in doctor.diagnose() if found.name == name]
    return found


def test_a_developers_environment_is_healthy_and_every_absence_has_a_cost_and_a_remedy() -> None:
    findings = doctor.diagnose()
    assert doctor.healthy(findings), [found for found in findings if found.status == "wrong"]
    assert all(found.cost_of_absence and found.what_to_do for found in findings if found.status == "absent")


def test_nothing_heavy_is_imported() -> None:
    program = """
import sys
from launch import doctor
doctor.table(doctor.diagnose())
heavy = {"torch", "megatron", "numba", "zarr", "wandb", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [("torch", "2.14.0", "2.14.0"), ("megatron-core", None, "not installed"), ("psutil", None, "not installed")],
)
def test_a_dependency_that_is_missing_or_out_of_range_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, found: str
) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda asked: version if asked == name else real(asked))
    told = finding(name)
    assert (told.status, told.found) == ("wrong", found)
    assert told.what_to_do.startswith(f"pip install '{name}") and told.cost_of_absence == doctor.REQUIRED[name]


def test_the_impostor_apex_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "apex", lambda: "impostor")
    assert finding("NVIDIA Apex").status == "wrong" and finding("NVIDIA Apex").what_to_do == "pip uninstall apex"


def test_a_foreign_kernels_in_the_way_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = guard.Foreign("kernels", Path("/site-packages/kernels"), ("kernels",), in_the_way=True)
    monkeypatch.setattr(guard, "foreign_rooms", lambda: [foreign])
    assert finding("foreign package").status == "wrong" and "kernels" in finding("foreign package").found


@pytest.mark.parametrize(("build", "status"), [("2.13.0+cpu", "wrong"), ("2.13.0+cu130", "ok"), ("2.13.0", "ok")])
def test_a_gpu_that_torch_cannot_use_is_wrong(monkeypatch: pytest.MonkeyPatch, build: str, status: str) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda asked: build if asked == "torch" else real(asked))
    monkeypatch.setattr(doctor, "_first_lines", lambda *command: ["NVIDIA H200, 143771 MiB"] * 2)
    assert finding("CUDA device").status == status
    assert finding("CUDA device").found.startswith("2 x NVIDIA H200")


def test_the_table_shows_brackets_as_they_are_and_advice_only_where_something_is_missing() -> None:
    findings = [
        doctor.Finding("a", "absent", "not installed", "slower", "pip install 'stoker[gpu]'"),
        doctor.Finding("b", "ok", "1.0", "COST"),
    ]
    console = Console(file=io.StringIO(), width=120)
    console.print(doctor.table(findings))
    text = console.file.getvalue()
    assert "slower; pip install 'stoker[gpu]'" in text and "COST" not in text


@pytest.mark.gpu
def test_the_doctor_counts_the_devices_that_torch_sees() -> None:
    import torch

    assert finding("CUDA device").found.startswith(f"{torch.cuda.device_count()} x ")
