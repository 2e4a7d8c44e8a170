"""``stoker doctor`` as a person meets it: installed is not usable, JSON for programs, a run's machine on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import doctor
from launch.preflight import run
from launch.preflight.report import Finding, Report
from tests.launch.test_cli import stoker
from tests.launch.tiny import tiny

MODULES = {
    "flash-attn": ("flash_attn.py", "flash_attn_func = None"),
    "transformer-engine": ("transformer_engine/pytorch.py", ""),
    "flash-linear-attention": ("fla/ops/gated_delta_rule.py", "chunk_gated_delta_rule = None"),
    "deep-ep": ("deep_ep.py", "Buffer = None"),
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of child processes; all of MODULES count as installed."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda asked: "9.9" if asked in MODULES else real(asked))
    return folder


def install(folder: Path, distribution: str, text: str | None = None) -> None:
    name, usual = MODULES[distribution]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(usual if text is None else text)


def row(name: str) -> doctor.Finding:
    (found,) = [found for found in doctor._optional() if found.name == name]
    return found


@pytest.mark.parametrize("distribution", MODULES)
def test_a_package_that_imports_is_usable(distribution: str, packages: Path) -> None:
    install(packages, distribution)
    found = row(doctor.OPTIONAL[distribution][0])
    assert (found.status, found.found) == ("ok", "9.9, usable")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open"),
        ("import os; os.abort()", "ends the interpreter (exit code -6)"),
        ("raise RuntimeError('No CUDA GPUs are available')", "No CUDA GPUs are available"),
        ("other = None", "cannot import name 'flash_attn_func'"),
    ],
)
def test_a_package_that_is_only_installed_costs_what_its_absence_costs(text: str, says: str, packages: Path) -> None:
    install(packages, "flash-attn", text)
    found = row("flash-attn")
    assert found.status == "absent" and found.found.startswith("9.9, and cannot be used: ") and says in found.found
    assert found.cost_of_absence == "softmax attention runs on torch's SDPA"


def test_a_package_whose_import_hangs_holds_the_doctor_up_no_longer_than_said(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(packages, "deep-ep", "import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "IMPORT_S", 1.0)
    assert "takes more than 1 s" in row("DeepEP").found


def test_an_apex_that_does_not_import_is_not_ok(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.guard.apex", lambda: "built")
    (packages / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    found = doctor._apex()
    assert found.status == "absent" and "undefined symbol" in found.found
    (packages / "amp_C.py").write_text("")
    (packages / "apex").mkdir()
    (packages / "apex" / "optimizers.py").write_text("FusedAdam = None")
    assert doctor._apex().status == "ok"


def test_json_is_what_the_table_says(capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("doctor", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told["format"] == {"name": "doctor", "version": 1} and "preflight" not in told
    assert {one["name"] for one in told["findings"]} >= {"Python", "torch", "NVIDIA Apex", "FLA", "DeepEP"}


def test_a_configuration_adds_the_preflight_and_its_refusal_is_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    found = [Finding("clock", "ok", "runs evenly")]

    def preflight(config: object, ranks: int) -> Report:
        asked.append((config.run.name, ranks))  # type: ignore[attr-defined]
        return Report("here", tuple(found), 0.5)

    monkeypatch.setattr(run, "preflight", preflight)
    path = tiny(tmp_path)
    assert stoker("doctor", "--config", path, "run.name=other", "--ranks", 3, "--json") == 0
    assert json.loads(capfd.readouterr().out)["preflight"]["findings"][0]["check"] == "clock"
    found.append(Finding("/dev/shm", "refuse", "3 MiB free", "docker run --shm-size=8g"))
    assert stoker("doctor", "--config", path) == 2
    assert "3 MiB free" in capfd.readouterr().out
    assert asked[0] == ("other", 3) and asked[1][0] == "tiny" and asked[1][1] >= 1


def test_overrides_without_a_configuration_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("doctor", "train.lr=1") == 2
    assert "refused: train.lr=1" in capfd.readouterr().err
