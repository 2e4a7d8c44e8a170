"""Stages: done once, killed anywhere, the same bytes in the end; a changed option repeats what follows from it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from dataio.stages import Counts, LocalPool, Stage, Task, Workspace, content_hash, total
from stoker.errors import Refusal

HERE, POOL = LocalPool(1), LocalPool(3)


def write(folder: Path, name: str, content: str, calls: Path | None = None, seconds: float = 0.0) -> Counts:
    """A task that leaves a trace of every call."""
    if calls is not None:
        with open(calls, "a") as file:
            file.write(f"{name}\n")
    time.sleep(seconds)
    partial_path = folder / f".{name}.partial"
    partial_path.write_text(content * 1000)
    partial_path.rename(folder / name)
    return {"documents": len(content), "bytes_in": 10}


def stage_of(folder: Path, count: int = 5, option: str = "a", seconds: float = 0.0) -> Stage:
    calls = folder / "calls"
    tasks = [
        Task(
            f"{i:05}",
            partial(write, folder, f"{i}.txt", f"{option}{i}", calls, seconds),
            {"in": f"hash{i}"},
            [f"{i}.txt"],
        )
        for i in range(count)
    ]
    return Stage("write", 1, {"option": option}, tasks)


def calls_of(folder: Path) -> list[str]:
    return sorted((folder / "calls").read_text().split())


@pytest.mark.parametrize("executor", [HERE, POOL], ids=["here", "pool"])
def test_a_task_is_done_once_and_again_when_what_decides_it_changes(executor: LocalPool, tmp_path: Path) -> None:
    workspace, stage = Workspace(tmp_path), stage_of(tmp_path)
    assert workspace.missing(stage) == [task.name for task in stage.tasks]
    first = workspace.run(stage, executor)
    assert [*first] == [task.name for task in stage.tasks] and workspace.missing(stage) == []
    assert total(first.values()) == {"bytes_in": 50, "documents": 10}
    assert workspace.run(stage, executor) == first
    assert calls_of(tmp_path) == [f"{i}.txt" for i in range(5)]

    (tmp_path / "2.txt").unlink()
    assert workspace.missing(stage) == ["00002"]
    assert workspace.run(stage, executor) == first

    other = stage_of(tmp_path, option="b")
    assert workspace.missing(other) == [task.name for task in other.tasks]
    tasks = [*stage.tasks[:4], Task("00004", stage.tasks[4].run, {"in": "another"}, ["4.txt"])]
    assert workspace.missing(Stage("write", 1, {"option": "a"}, tasks)) == ["00004"]
    assert workspace.missing(Stage("write", 2, {"option": "a"}, stage.tasks)) == [task.name for task in stage.tasks]


def test_manifests_say_what_was_made_and_differ_in_nothing_from_run_to_run(tmp_path: Path) -> None:
    for name, executor in (("one", HERE), ("two", POOL)):
        (tmp_path / name).mkdir()
        Workspace(tmp_path / name).run(stage_of(tmp_path / name), executor)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    manifest = Workspace(tmp_path / "one").manifest("write", "00003")
    assert manifest is not None and manifest.outputs == {"3.txt": content_hash(tmp_path / "one" / "3.txt")}
    assert manifest.counts == {"bytes_in": 10, "documents": 2} and manifest.options == {"option": "a"}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the traces of the tests and the times."""
    left_out = {"calls", "timings.jsonl"}
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


RUN = """
import sys
from pathlib import Path
from dataio.stages import LocalPool, Workspace
from tests.dataio.test_stages import stage_of
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    Workspace(folder).run(stage_of(folder, 12, seconds=0.03), LocalPool(2))
"""


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    Workspace(tmp_path / "whole").run(stage_of(tmp_path / "whole", 12), HERE)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    generator, killed, calls = random.Random(0), 0, tmp_path / "killed" / "calls"
    while True:
        begun = len(calls_of(tmp_path / "killed")) if calls.exists() else 0
        child = subprocess.Popen([sys.executable, script, tmp_path / "killed"], env=environment)
        until = begun + generator.randint(1, 4)
        while child.poll() is None and not (calls.exists() and len(calls_of(tmp_path / "killed")) >= until):
            time.sleep(0.005)
        if child.poll() is not None:
            assert child.returncode == 0
            break
        time.sleep(generator.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        killed += 1
    assert killed >= 3
    time.sleep(0.2)  # workers end with their parent
    found = {name: data for name, data in tree(tmp_path / "killed").items() if not name.startswith(".")}
    assert found == tree(tmp_path / "whole")


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN.replace("0.03", "30"))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, script, tmp_path], env=environment)
    calls = tmp_path / "calls"
    deadline = time.monotonic() + 60
    while not (calls.exists() and len(calls.read_text().split()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    while any(_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(workers) >= 2


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def refuse() -> Counts:
    raise Refusal("records.jsonl, line 7: not JSON")


def fill_the_disk() -> Counts:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "documents/web/00001.parquet")


def die() -> Counts:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def write_nothing() -> Counts:
    return {}


@pytest.mark.parametrize("executor", [HERE, POOL], ids=["here", "pool"])
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (refuse, r"write, bad: records\.jsonl, line 7: not JSON"),
        (fill_the_disk, r"write, bad: no space left for documents/web/00001\.parquet; .* run the same command again"),
        (write_nothing, r"write, bad: ended without writing bad\.txt"),
    ],
)
def test_a_failure_names_its_task_and_what_others_finished_stays(
    run: object, said: str, executor: LocalPool, tmp_path: Path
) -> None:
    good = stage_of(tmp_path, 3)
    bad = Task("bad", run, {}, ["bad.txt"])  # type: ignore[arg-type]
    with pytest.raises(Refusal, match=said):
        Workspace(tmp_path).run(Stage("write", 1, {"option": "a"}, [*good.tasks, bad]), executor)
    if executor is HERE:
        assert Workspace(tmp_path).missing(good) == []


def test_a_worker_that_dies_is_told_with_what_to_do(tmp_path: Path) -> None:
    tasks = [Task(name, die, {}, [f"{name}.txt"]) for name in "ab"]
    with pytest.raises(Refusal, match=r"a worker process died: .* fewer workers or more memory"):
        Workspace(tmp_path).run(Stage("write", 1, {}, tasks), POOL)


def test_a_damaged_or_newer_manifest_is_refused(tmp_path: Path) -> None:
    workspace, stage = Workspace(tmp_path), stage_of(tmp_path, 1)
    workspace.run(stage, HERE)
    path = tmp_path / "manifests" / "write" / "00000.json"
    content = path.read_text()
    path.write_text(content[:50])
    with pytest.raises(Refusal, match=r"00000\.json: cannot be read"):
        workspace.run(stage, HERE)
    path.write_text(content.replace('"version":1', '"version":2'))
    with pytest.raises(Refusal, match="newer release"):
        workspace.run(stage, HERE)
