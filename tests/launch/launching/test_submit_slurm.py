"""``stoker launch slurm`` where Slurm does not say whether it took the job, and how a sweep's arrays are stopped."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.launching import slurm
from launch.launching.folder import Folder
from launch.launching.job import Prepared
from launch.launching.slurm import array_tasks, stop_arrays, submit, submit_array
from pretrain.config_sections import LaunchSection
from stoker.errors import Refusal
from tests.house.sources import HOME
from tests.launch.launching.jobs import on_slurm, prepared, tree, value
from tests.launch.launching.slurm_cluster import Cluster, until
from tests.launch.tiny import tiny

LATE = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
#: A task that says that it has begun, and which signal asked it to end.
TASK = """
import os, signal, sys, time
note = lambda text: open(f"{sys.argv[1]}/notes-{os.environ['SLURM_ARRAY_TASK_ID']}", "a").write(text + "\\n")
def told(number, frame):
    note(signal.Signals(number).name)
    if os.path.exists(f"{sys.argv[1]}/saved"):
        sys.exit(4)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGUSR1, told)
note("start")
while not os.path.exists(f"{sys.argv[1]}/saved"):
    time.sleep(0.05)
sys.exit(4)
"""


@pytest.fixture
def ready(tmp_path: Path) -> Prepared:
    return prepared(config=str(tiny(tmp_path)), hardware="cpu", nodes=2, ranks=1)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts commands in the place of Slurm's; sinfo always has nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, limit in (("ASK_S", 3), ("SUBMIT_S", 3), ("LOOK_S", 0)):
        monkeypatch.setattr(slurm, name, limit)

    def put(name: str, text: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    put("sinfo", "echo 'batch|4'")
    put("squeue", "exit 0")
    put("scontrol", "exit 0")
    return put


def refused(ready: Prepared) -> str:
    with pytest.raises(Refusal) as refusal:
        submit(ready, Folder.next(ready.config.run_dir))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_launch_carries_the_mark_by_which_it_is_found(ready: Prepared) -> None:
    argv = on_slurm(ready).argv
    assert value(argv, "--comment") == f"stoker {ready.config.run_dir}/launch/0001"


def test_two_launches_of_one_folder_have_marks_of_their_own(
    ready: Prepared, tmp_path: Path, command: Callable[[str, str], None]
) -> None:
    command("sbatch", f"printf '%s\\n' \"$@\" >> {tmp_path}/argv; echo 77")
    for _ in range(2):
        submit(ready, Folder.next(ready.config.run_dir))
        shutil.rmtree(ready.config.run_dir)
    marks = [word for word in (tmp_path / "argv").read_text().splitlines() if word.startswith("--comment=")]
    assert len(set(marks)) == 2 and all(f"{ready.config.run_dir}/launch/0001 " in mark for mark in marks)


@pytest.mark.parametrize(
    "sbatch",
    [
        "exec sleep 60",  # no answer
        f"echo '{LATE}' >&2; exit 1",
        "echo 'Batch job submission failed: Unable to contact slurm controller (receive failure)' >&2; exit 1",
        "kill -KILL $$",
        "echo 'site policy: welcome'",  # no number
    ],
)
def test_a_job_that_slurm_took_without_saying_so_is_found(
    ready: Prepared, command: Callable[[str, str], None], sbatch: str
) -> None:
    here = ready.config.run_dir.parent
    command("sbatch", f'for word; do [[ $word == --comment=* ]] && echo "${{word#*=}}" > {here}/mark; done; {sbatch}')
    mark = f"$(cat {here}/mark)"
    lines = [f"76|N/A|RUNNING|{mark}0", f"77|N/A|PENDING|{mark}", "78|N/A|RUNNING|other"]
    command("squeue", "\n".join(f'echo "{line}"' for line in lines))
    assert submit(ready, Folder.next(ready.config.run_dir)) == "77"
    assert '"job": "77"' in (ready.config.run_dir / "launch/0001/submission.json").read_text()


@pytest.mark.parametrize(
    ("squeue", "seen"), [("exit 0", "squeue shows no such job"), ("exec sleep 60", "controller did not answer squeue")]
)
def test_where_nobody_knows_the_launch_stays_and_the_message_says_how_to_look_and_cancel(
    ready: Prepared, command: Callable[[str, str], None], squeue: str, seen: str
) -> None:
    command("sbatch", f"echo '{LATE}' >&2; exit 1")
    command("squeue", squeue)
    text = refused(ready)
    folder = ready.config.run_dir / "launch/0001"
    assert "Socket timed out" in text and seen in text and f"{folder} stays" in text
    assert f"`squeue --me --format='%F %k'` shows it by the words 'stoker {folder} " in text
    assert {"launch.json", "config.yaml"} <= set(tree(folder))
    assert Folder.next(ready.config.run_dir).number == 2, "the next launch has a mark of its own"


def test_an_array_that_nobody_knows_of_is_found_once_it_is_there(
    tmp_path: Path, command: Callable[[str, str], None]
) -> None:
    command("sbatch", f"printf '%s\\n' \"$@\" > {tmp_path}/argv; echo '{LATE}' >&2; exit 1")
    with pytest.raises(Refusal, match="may be there all the same"):
        submit_array([sys.executable], tmp_path, [1, 2], 1, LaunchSection(), 1, 0)
    assert array_tasks(tmp_path) == [] and len(list(tmp_path.glob("array-*.json"))) == 1
    command("squeue", f"echo '12|2|PENDING|{value((tmp_path / 'argv').read_text().splitlines(), '--comment')}'")
    assert [(task.job, task.index) for task in array_tasks(tmp_path)] == [("12", 2)]


def test_an_array_whose_command_is_killed_before_the_answer_is_found(
    tmp_path: Path, command: Callable[[str, str], None]
) -> None:
    command("sbatch", f"printf '%s\\n' \"$@\" > {tmp_path}/argv; kill -KILL $PPID; sleep 1")
    asks = "from launch.launching.slurm import submit_array; from pretrain.config_sections import LaunchSection; "
    asks += f"from pathlib import Path; submit_array(['x'], Path({str(tmp_path)!r}), [1, 2], 1, LaunchSection(), 1, 0)"
    assert subprocess.run([sys.executable, "-c", asks], cwd=HOME).returncode == -9
    command("squeue", f"echo '12|2|PENDING|{value((tmp_path / 'argv').read_text().splitlines(), '--comment')}'")
    assert [(task.job, task.index) for task in array_tasks(tmp_path)] == [("12", 2)]


def test_an_array_that_slurm_refuses_leaves_nothing(tmp_path: Path, command: Callable[[str, str], None]) -> None:
    command("sbatch", "echo 'Invalid account' >&2; exit 1")
    with pytest.raises(Refusal, match="Invalid account; nothing was submitted"):
        submit_array([sys.executable], tmp_path, [1, 2], 1, LaunchSection(), 1, 0)
    assert list(tmp_path.glob("array-*.json")) == []


@pytest.mark.parametrize("sbatch", ["#!/no/such/interpreter\n", ""])
def test_an_sbatch_that_cannot_be_started_is_one_message_and_leaves_nothing(
    ready: Prepared,
    command: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sbatch: str,
) -> None:
    command("sbatch", "")
    (tmp_path / "bin/sbatch").write_text(sbatch)  # no interpreter; no program
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    before = tree(tmp_path)
    assert "sbatch cannot be run" in refused(ready)
    assert tree(tmp_path) == before


def test_arguments_that_the_system_does_not_take_are_one_message(
    tmp_path: Path, command: Callable[[str, str], None]
) -> None:
    command("sbatch", "echo 1")
    with pytest.raises(Refusal, match="sbatch cannot be run \\(Argument list too long\\): nothing was submitted"):
        submit_array(["python", "x" * 4000] * 2000, tmp_path, [1], 1, LaunchSection(), 1, 0)
    assert not list(tmp_path.glob("array-*"))


@pytest.mark.parametrize("said", ["batch", "batch|1.2K", "|"])
def test_an_answer_of_sinfo_that_is_none_is_one_message(
    ready: Prepared, command: Callable[[str, str], None], said: str
) -> None:
    command("sbatch", "exit 9")
    command("sinfo", f"echo '{said}'")
    assert "where a partition and its nodes should be; nothing was submitted" in refused(ready)


def test_a_full_disk_before_the_job_leaves_nothing(
    ready: Prepared, command: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command("sbatch", "exit 9")
    before = tree(tmp_path)

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slurm, "write_atomic", full)
    assert "cannot be written (No space left on device): nothing was submitted" in refused(ready)
    assert tree(tmp_path) == before


def test_a_full_disk_after_the_job_costs_the_record_alone(
    ready: Prepared,
    command: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command("sbatch", "echo '12;cluster'")

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launch.launching.folder.write_atomic", full)
    assert submit(ready, Folder.next(ready.config.run_dir)) == "12"
    assert "job 12 is submitted, and" in capsys.readouterr().err


def array(folder: Path, command: Callable[[str, str], None], number: int) -> str:
    """Submit an array of three to a Slurm that calls it ``number``; its mark."""
    command("sbatch", f"echo {number}; printf '%s\\n' \"$@\" > {folder}/argv")
    assert submit_array([sys.executable], folder, [1, 2, 5], 1, LaunchSection(), 1, 0) == str(number)
    return value((folder / "argv").read_text().splitlines(), "--comment")


def test_stop_takes_out_what_waits_then_asks_what_runs_and_nothing_else(
    tmp_path: Path, command: Callable[[str, str], None]
) -> None:
    marks = [array(tmp_path, command, number) for number in (12, 13)]
    assert marks[0] != marks[1]
    lines = [
        f"12|1|RUNNING|{marks[0]}", f"12|2|PENDING|{marks[0]}", f"13|5|PENDING|{marks[1]}", "12|1|RUNNING|stoker other",
        "14|N/A|RUNNING|(null)",
    ]  # fmt: skip
    command("squeue", "echo '" + "\n".join(lines) + "'")
    command("scancel", f'echo "$@" >> {tmp_path}/cancelled')
    stopped = stop_arrays(tmp_path)
    assert [(task.job, task.index) for task in stopped if not task.waits] == [("12", 1)]
    assert [(task.job, task.index) for task in stopped if task.waits] == [("12", 2), ("13", 5)]
    assert (tmp_path / "cancelled").read_text().splitlines() == [
        "--state=PENDING 12",
        "--state=PENDING 13",
        "--full --signal=TERM 12",
    ]
    assert {task.index for task in array_tasks(tmp_path)} == {1, 2, 5}


def test_a_task_that_begins_as_the_waiting_ones_are_taken_out_is_asked_to_save(
    tmp_path: Path, command: Callable[[str, str], None]
) -> None:
    mark = array(tmp_path, command, 12)
    command("squeue", f"[[ -f {tmp_path}/cancelled ]] && echo '12|1|RUNNING|{mark}' || echo '12|1|PENDING|{mark}'")
    command("scancel", f'echo "$@" >> {tmp_path}/cancelled')
    command("scontrol", f'echo "$@" >> {tmp_path}/cancelled')
    assert [task.waits for task in stop_arrays(tmp_path)] == [False]
    assert (tmp_path / "cancelled").read_text().splitlines() == [
        "--state=PENDING 12",
        "update JobId=12_[1] Requeue=0",
        "--full --signal=TERM 12",
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("squeue", "exec sleep 60", "did not answer squeue in 3 s: nothing was changed"),
        ("squeue", "echo 'Unable to contact slurm\n controller' >&2; exit 1", "slurm controller; nothing was changed"),
        ("scancel", "exec sleep 60", "did not answer scancel in 3 s: give the command again"),
    ],
)
def test_stop_without_a_scheduler_is_one_message(
    tmp_path: Path, command: Callable[[str, str], None], name: str, text: str, said: str
) -> None:
    mark = array(tmp_path, command, 12)
    command("squeue", f"echo '12|1|RUNNING|{mark}'")
    command("scancel", "exit 0")
    command(name, text)
    with pytest.raises(Refusal, match=said) as refusal:
        stop_arrays(tmp_path)
    assert "\n" not in str(refusal.value)


def test_an_array_that_ends_meanwhile_is_no_error(tmp_path: Path, command: Callable[[str, str], None]) -> None:
    mark = array(tmp_path, command, 12)
    command("squeue", f"echo '12|1|RUNNING|{mark}'")
    command("scancel", "echo 'scancel: error: Kill job error on job id 12: Invalid job id specified' >&2; exit 1")
    assert len(stop_arrays(tmp_path)) == 1


def test_slurm_has_the_job_whose_answer_was_lost(
    cluster: Cluster, ready: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = tmp_path / "bin"
    fakes.mkdir()
    real = os.environ["PATH"]
    lost = fakes / "sbatch"
    lost.write_text(f'#!/bin/bash\nPATH={real!r} sbatch --hold "$@" > {tmp_path}/number\nexec sleep 60\n')
    lost.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fakes}:{real}")
    monkeypatch.setattr(slurm, "SUBMIT_S", 3)
    number = submit(ready, Folder.next(ready.config.run_dir))
    assert number == (tmp_path / "number").read_text().strip()
    cluster.run("scancel", number)


def test_slurm_takes_a_run_directory_of_a_thousand_characters(cluster: Cluster, tmp_path: Path) -> None:
    deep = "/".join(["é" * 100] * 10)
    ready = prepared(f"run.dir={tmp_path}/{deep}", config=str(tiny(tmp_path)), hardware="cpu", nodes=2, ranks=1)
    cluster.run("scancel", submit(ready, Folder.next(ready.config.run_dir)))


def test_a_sweep_on_slurm_is_stopped_and_stopping_it_again_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    argv = [sys.executable, str(tmp_path / "task.py"), str(tmp_path)]
    number = submit_array(argv, tmp_path, [1, 2, 3], 1, LaunchSection(), 1, 0)
    first = tmp_path / "notes-1"
    until(first.exists, 40)
    assert {task.index: task.waits for task in array_tasks(tmp_path)} == {1: False, 2: True, 3: True}
    stopped = stop_arrays(tmp_path)
    assert [task.waits for task in sorted(stopped, key=lambda task: task.index or 0)] == [False, True, True]
    until(lambda: "SIGTERM" in first.read_text(), 20)
    assert [task.index for task in stop_arrays(tmp_path)] == [1], "it saves, and no other has begun"
    (tmp_path / "saved").touch()
    until(lambda: not cluster.run("squeue", "--noheader", "--job", number), 20)
    assert stop_arrays(tmp_path) == []
    assert not (tmp_path / "notes-2").exists() and not (tmp_path / "notes-3").exists()
    assert set(first.read_text().split()) == {"start", "SIGTERM"}, "asked, and not killed"
