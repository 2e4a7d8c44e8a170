"""The run directory: refusals touch nothing, every attempt leaves its record, and a run resumes as it was told."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain import rundir
from pretrain.attempt import Exit, ExitClass, environment, lock_sha256, read_exit, record_exit
from pretrain.config import RunConfig, load
from pretrain.rundir import Attempt, begin, inspect, last_device
from stoker.errors import Refusal
from stoker.yaml_core import parse_yaml

#: What the tests below count on, whatever the preset is tuned to.
FIXED = ("run.steps=240", "train.lr=3e-3", "train.schedule.warmup_steps=20")


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    return load("demo", [f"run.dir={tmp_path}", "parallel={}", *FIXED, *overrides])


def launch(tmp_path: Path, *overrides: str) -> Attempt:
    chosen = config(tmp_path, *overrides)
    return begin(inspect(chosen), chosen, chosen.plan(1))


def commit(root: Path, *steps: int) -> None:
    for step in steps:
        folder = root / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "COMMIT").touch()


def everything(root: Path) -> dict[str, Any]:
    """Every path below with its content and time of change."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [root, *root.rglob("*")]
    }


def test_an_attempt_leaves_what_the_format_lists(tmp_path: Path) -> None:
    attempt = launch(tmp_path)
    attempt.finish(ExitClass.DONE)
    written = {str(path.relative_to(attempt.root)) for path in attempt.root.rglob("*") if path.is_file()}
    assert written - {".lock"} == {
        "format.json",
        "config.yaml",
        "plan.json",
        "attempts/0001/config.yaml",
        "attempts/0001/plan.json",
        "attempts/0001/environment.json",
        "attempts/0001/exit.json",
    }
    for name in written - {".lock"}:
        content = parse_yaml((attempt.root / name).read_text(), name)
        assert content["format"]["version"] == (2 if name.endswith("exit.json") else 1), name
    assert load(attempt.root / "config.yaml") == config(tmp_path)
    assert load(attempt.path / "config.yaml") == config(tmp_path)
    provenance = parse_yaml((attempt.path / "config.yaml").read_text(), "")["provenance"]
    assert provenance["lock_sha256"] == lock_sha256() and "code_commit" in provenance
    assert json.loads((attempt.root / "plan.json").read_text())["plan"] == config(tmp_path).plan(1).to_dict()


def test_attempts_count_up_and_the_newest_configuration_stands(tmp_path: Path) -> None:
    launch(tmp_path).close()
    attempt = launch(tmp_path, "log.every=3")
    assert attempt.number == 2 and rundir.attempts(attempt.root) == [1, 2]
    assert load(attempt.root / "config.yaml").log.every == 3
    assert load(rundir.attempt_path(attempt.root, 1) / "config.yaml").log.every == 10


def spoil(name: str, root: Path) -> None:
    """Make ``root`` such that a launch must be refused."""
    match name:
        case "a newer release wrote it":
            (root / "format.json").write_text('{"format": {"name": "run", "version": 99}}')
        case "its configuration is of a newer release":
            (root / "config.yaml").write_text("format: {name: config, version: 99}")
        case "its configuration is damaged":
            (root / "config.yaml").write_text("run: {name: ")
        case "its stamp is damaged":
            (root / "format.json").write_text("{")
        case "it is no run directory":
            (root / "format.json").unlink()
        case "checkpoints":
            commit(root, 60, 120)


@pytest.mark.parametrize(
    ("state", "overrides", "expected"),
    [
        ("a newer release wrote it", [], "format.json: written as run version 99 by a newer release"),
        ("its configuration is of a newer release", [], "config.yaml: written as config version 99"),
        ("its configuration is damaged", [], "config.yaml is not YAML: line 1"),
        ("its stamp is damaged", [], "no readable format.json"),
        ("it is no run directory", [], "is no run directory. Choose another run.name or run.dir"),
        ("", ["run.seed=1"], "run.seed: 0 -> 1: this would be another run"),
        ("", ["model.moe.top_k=1"], "model.moe.top_k: 2 -> 1: this would be another run"),
        ("", ["model.vocab_size=8192"], "choose another run.name"),
        ("", ["data.tokenizer=other.json"], "data.tokenizer: None -> 'other.json'"),
        ("", ["run.dtype=float64"], "run.dtype: 'float32' -> 'float64'"),
        ("", ["train.lr=1e-2"], "say so: run.allow_change=[train.lr]"),
        ("", ["data.blend={data/demo/train/code: 1}"], "say so: run.allow_change=[data.blend]"),
        ("", ["run.steps=500"], "say so: run.allow_change=[run.steps]"),
        ("checkpoints", ["run.resume=never"], "run.resume=never and"),
        ("checkpoints", ["run.resume=61"], "no committed checkpoint of that step (it holds 60, 120)"),
        (
            "checkpoints",
            ["run.steps=90", "run.allow_change=[run]", "train.schedule.warmup_steps=20"],
            "raise run.steps",
        ),
        ("", ["run.resume=60"], "it holds none"),
    ],
)
def test_p7_a_launch_that_is_refused_touches_nothing(
    tmp_path: Path, state: str, overrides: list[str], expected: str
) -> None:
    attempt = launch(tmp_path)
    attempt.close()
    spoil(state, attempt.root)
    before = everything(tmp_path)
    with pytest.raises(Refusal) as refused:
        inspect(config(tmp_path, *overrides))
    assert expected in str(refused.value)
    assert everything(tmp_path) == before


def test_p7_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(Refusal, match="cannot be written"):
        inspect(config(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["demo", "."])
def test_p7_a_file_in_the_way_is_refused(tmp_path: Path, where: str) -> None:
    runs = tmp_path / "runs"
    (tmp_path / "runs" if where == "." else runs / where).parent.mkdir(exist_ok=True)
    (runs if where == "." else runs / where).write_text("here first")
    with pytest.raises(Refusal, match="is a file"):
        inspect(config(runs))


def test_a_directory_that_holds_only_what_a_crash_left_is_fresh(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    root.mkdir()
    (root / ".format.json.0123.tmp").touch()
    assert inspect(config(tmp_path)).attempt == 1
    launch(tmp_path).close()
    (root / "config.yaml").unlink()  # killed before it was written
    assert launch(tmp_path).number == 2


def test_the_newest_committed_checkpoint_is_resumed_and_others_by_step(tmp_path: Path) -> None:
    attempt = launch(tmp_path)
    attempt.close()
    assert inspect(config(tmp_path)).resume_step is None
    commit(attempt.root, 60, 120)
    (attempt.root / "checkpoints" / "step_00000180").mkdir()  # never committed
    (attempt.root / "checkpoints" / "step_00000150.quarantined").mkdir()
    (attempt.root / "checkpoints" / "step_00000150.quarantined" / "COMMIT").touch()
    assert rundir.committed_steps(attempt.root) == [60, 120]
    assert inspect(config(tmp_path)).resume_step == 120
    assert inspect(config(tmp_path, "run.resume=60")).resume_step == 60
    assert inspect(config(tmp_path), committed=[60]).resume_step == 60, "the caller knows which are intact"


def test_an_allowed_change_is_recorded_with_the_attempt(tmp_path: Path) -> None:
    launch(tmp_path).close()
    attempt = launch(tmp_path, "train.lr=1e-2", "run.allow_change=[train.lr]", "log.every=2")
    start = json.loads((attempt.path / "environment.json").read_text())["start"]
    assert ["train.lr", 3e-3, 1e-2] in start["changes"] and ["log.every", 10, 2] in start["changes"]


def test_one_launch_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    first = launch(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(Refusal, match=rf"in use by process {os.getpid()} on"):
        inspect(config(tmp_path))
    assert everything(tmp_path) == before
    first.close()
    program = (
        "import os, signal, sys; from pathlib import Path; from tests.pretrain.test_rundir import launch\n"
        "attempt = launch(Path(sys.argv[1])); print(attempt.number, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    repository = Path(rundir.__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert (killed.stdout.strip(), killed.returncode) == ("2", -9), killed.stderr
    third = launch(tmp_path)
    assert third.number == 3 and read_exit(rundir.attempt_path(third.root, 2)) is None


def test_a_file_system_without_locks_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert launch(tmp_path).number == 1
    assert "a second launch at once is not noticed" in caplog.text


def test_two_launches_that_saw_the_same_state_do_not_share_an_attempt(tmp_path: Path) -> None:
    chosen = config(tmp_path)
    start = inspect(chosen)
    begin(start, chosen, chosen.plan(1)).close()
    with pytest.raises(Refusal, match="begun by another launch"):
        begin(start, chosen, chosen.plan(1))
    assert inspect(chosen).attempt == 2


def test_the_first_rank_that_knows_why_an_attempt_ended_is_believed(tmp_path: Path) -> None:
    assert read_exit(tmp_path) is None
    assert record_exit(tmp_path, ExitClass.FAULT, "ZeroDivisionError on rank 3", rank=3)
    assert not record_exit(tmp_path, ExitClass.FAULT, "connection closed by peer", rank=0)
    assert read_exit(tmp_path) == Exit(ExitClass.FAULT, "ZeroDivisionError on rank 3", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


@pytest.mark.parametrize("text", ["{", '{"format": {"name": "exit", "version": 1}, "class": "bored"}', '{"format": 3}'])
def test_p7_a_damaged_exit_record_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "exit.json").write_text(text)
    with pytest.raises(Refusal, match=r"exit\.json"):
        read_exit(tmp_path)


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    codes = {exit_class.name: exit_class.code for exit_class in ExitClass}
    assert codes == {"DONE": 0, "FAULT": 1, "REFUSED": 2, "STOPPED": 3, "PREEMPTED": 4}


def test_the_environment_is_recorded_by_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("OMP_NUM_THREADS_OF_MINE", "canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-canary-canary")
    monkeypatch.setenv("NCCL_API_KEY", "canary-canary")
    found = environment()
    assert found["variables"]["OMP_NUM_THREADS"] == "1" and found["variables"]["NCCL_DEBUG"] == "INFO"
    assert "canary" not in json.dumps(found)
    assert found["packages"]["pydantic"] and found["packages"]["zarr"]


def test_a_password_in_a_path_is_not_written_down_and_does_not_stop_a_resume(tmp_path: Path) -> None:
    blend = "data.blend={'https://me:hunter2hunter2@host/store': 1}"
    launch(tmp_path, blend).close()
    attempt = launch(tmp_path, blend)
    attempt.finish(ExitClass.FAULT, "cannot reach https://me:hunter2hunter2@host/store")
    assert all(b"hunter2" not in path.read_bytes() for path in attempt.root.rglob("*") if path.is_file())


def test_what_a_run_computed_on_last_is_told_by_the_newest_attempt_that_began(tmp_path: Path) -> None:
    config = load("demo", [f"run.dir={tmp_path}"])
    assert last_device(config.run_dir) is None
    for device in ("cpu", "cuda"):
        begin(inspect(config), config, config.plan(1), device=device).close()
    (config.run_dir / "attempts/0003").mkdir()  # it ended before it began
    assert last_device(config.run_dir) == "cuda"
    (config.run_dir / "attempts/0002/environment.json").write_text("{")
    assert last_device(config.run_dir) is None
