"""Stages on Ray: the bytes of a local run, on three nodes, whatever dies meanwhile. Without Ray: what keeps runs apart.

The cluster is real: three node managers and their workers, each node with one core, on this machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataio import ray_executor
from dataio.dedup import arrays, exact
from dataio.documents import Document, write_documents
from dataio.prepare import prepare
from dataio.ray_executor import MARK, RayCluster, _attempt, _begin, software
from dataio.recipe import load
from dataio.stages import Counts, LocalPool, Stage, Task, Workspace
from stoker.errors import Refusal
from tests.dataio import test_prepare
from tests.dataio.test_stages import calls_of, die, fill_the_disk, refuse, stage_of, tree, write_nothing

HOME = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != MARK and not name.startswith("nodes")}


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def done() -> Counts:
    return {"documents": 1}


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Refusal, match=r"Ray is not installed .* `pip install 'stoker\[ray\]'`"):
        RayCluster(tmp_path).__enter__()


def test_a_node_is_refused_that_has_other_software_or_another_folder(tmp_path: Path) -> None:
    _begin(tmp_path, "token")
    assert _attempt(done, 0, tmp_path, "token", software())[0] == {"documents": 1}
    with pytest.raises(Refusal, match=r"has pyarrow [\d.]+ for 1\.0, with which this run began"):
        _attempt(done, 0, tmp_path, "token", software() | {"pyarrow": "1.0"})
    with pytest.raises(Refusal, match="must lie on a file system that all nodes share"):
        _attempt(done, 0, tmp_path / "elsewhere", "token", software())
    with pytest.raises(Refusal, match="finds another run in"):
        _attempt(done, 0, tmp_path, "a token of old", software())


HOLD = """
import sys, time
from pathlib import Path
from dataio.ray_executor import _attempt, software

def call():
    print("begun", flush=True)
    time.sleep(30)

_attempt(call, int(sys.argv[2]), Path(sys.argv[1]), "old", software())
"""


def test_what_is_still_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a new run nor a second attempt at a task begins before it ends; other tasks do."""
    _begin(tmp_path, "old")
    holder = python(HOLD, tmp_path, 3)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "begun\n"
        monkeypatch.setattr(ray_executor, "LEFT_BEHIND_S", 0.2)
        _attempt(done, 2, tmp_path, "old", software())
        with pytest.raises(Refusal, match="finds another run"):
            _attempt(done, 3, tmp_path, "old", software())
        with pytest.raises(Refusal, match=r"tasks of another run still write here after 0\.2 s"):
            _begin(tmp_path, "new")
        assert (tmp_path / MARK).read_text() == "old"
    finally:
        holder.kill()
        holder.wait()
    _begin(tmp_path, "new")
    with pytest.raises(Refusal, match="finds another run"):
        _attempt(done, 3, tmp_path, "old", software())


def reports_its_node(run: Callable[[], Counts], folder: Path, doomed: str | None = None) -> Counts:
    """`run`, or on the node `doomed` nothing that would end by itself."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    with open(folder / "nodes", "a") as file:
        file.write(f"{node}\n")
    while node == doomed:
        time.sleep(0.01)
    return run()


def concatenate(paths: Sequence[Path], out: Path) -> Counts:
    arrays.save(out, np.concatenate([np.load(path) for path in paths]))
    return {"documents": len(paths)}


def nodes_of(folder: Path) -> list[str]:
    path = folder / "nodes"
    return path.read_text().split() if path.exists() else []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'stoker[ray]'")
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "200",
        "RAY_health_check_failure_threshold": "3",
        "PYTHONPATH": str(HOME),
    }
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(**node)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def executor(cluster: Any, tmp_path: Path) -> Iterator[RayCluster]:
    with RayCluster(tmp_path, cluster.address, retries=2) as made:
        yield made


@pytest.mark.verify
def test_three_nodes_write_the_bytes_of_a_local_run(executor: RayCluster, tmp_path: Path) -> None:
    """Two stages, the second reading what the first wrote on other nodes."""

    def stages(folder: Path, wrap: Callable[[Callable[[], Counts]], Callable[[], Counts]]) -> list[Stage]:
        paths = [folder / f"{i}.parquet" for i in range(9)]
        for i, path in enumerate(paths):
            texts = [f"text {i * j % 40}\n" for j in range(65)]
            write_documents(path, [Document(text, "s", f"{i}/{row}", i, row) for row, text in enumerate(texts)])
        digests = [folder / f"{i}.npy" for i in range(9)]
        first = [
            Task(to.stem, wrap(partial(exact.digest, path, to)), {}, [to.name]) for path, to in zip(paths, digests)
        ]
        second = Task("all", wrap(partial(concatenate, digests, folder / "all.npy")), {}, ["all.npy"])
        return [Stage("digest", 1, {}, first), Stage("concatenate", 1, {}, [second])]

    local, remote = tmp_path / "local", tmp_path / "remote"
    executor.workspace = remote
    for stage in stages(local, lambda run: run):
        Workspace(local).run(stage, LocalPool(1))
    for stage in stages(remote, lambda run: partial(reports_its_node, run, remote)):
        Workspace(remote).run(stage, executor)
    assert files(remote) == files(local) and len(files(local)) == 29
    assert len(set(nodes_of(remote))) == 3


@pytest.mark.verify
def test_a_recipe_gives_the_same_stores_on_three_nodes(executor: RayCluster, tmp_path: Path) -> None:
    test_prepare.corpus(tmp_path)
    local = test_prepare.run(tmp_path)
    expected = test_prepare.tree(local)
    local.rename(tmp_path / "local")
    executor.workspace = local
    recipe, base = load(test_prepare.written(tmp_path))
    prepare(recipe, base, executor)
    found = test_prepare.tree(local)
    found.pop(MARK)
    assert found == expected and sum("stores/" in name for name in found) > 20


@pytest.mark.verify
def test_tasks_of_a_node_that_is_lost_are_run_again(cluster: Any, executor: RayCluster, tmp_path: Path) -> None:
    for name in ("whole", "lossy"):
        (tmp_path / name).mkdir()
    Workspace(tmp_path / "whole").run(stage_of(tmp_path / "whole", 9), LocalPool(1))
    folder = executor.workspace = tmp_path / "lossy"
    doomed = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    stage = stage_of(folder, 9)
    tasks = [
        Task(t.name, partial(reports_its_node, t.run, folder, doomed.node_id), t.inputs, t.outputs) for t in stage.tasks
    ]

    def lose() -> None:
        while doomed.node_id not in nodes_of(folder):
            time.sleep(0.01)
        cluster.remove_node(doomed, allow_graceful=False)

    with ThreadPoolExecutor(1) as thread:
        lost = thread.submit(lose)
        Workspace(folder).run(Stage("write", 1, stage.options, tasks), executor)
        lost.result()
    assert files(folder) == files(tmp_path / "whole")
    assert len(nodes_of(folder)) > len(calls_of(folder)) == 9


@pytest.mark.verify
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (refuse, r"^write, bad: records\.jsonl, line 7: not JSON$"),
        (fill_the_disk, r"^write, bad: no space left for documents/web/00001\.parquet; .* same command again$"),
        (write_nothing, r"^write, bad: ended without writing bad\.txt$"),
        (die, r"^a task was lost 3 times with its worker or node \(WorkerCrashedError: .* run the same command again$"),
    ],
)
def test_a_failure_reads_as_it_does_locally(
    run: Callable[[], Counts], said: str, executor: RayCluster, tmp_path: Path
) -> None:
    tasks = [*stage_of(tmp_path, 3).tasks, Task("bad", run, {}, ["bad.txt"])]
    with pytest.raises(Refusal, match=said):
        Workspace(tmp_path).run(Stage("write", 1, {"option": "a"}, tasks), executor)


@pytest.mark.verify
def test_a_cluster_without_room_for_a_task_is_refused(executor: RayCluster) -> None:
    executor.task_cpus = 65
    with pytest.raises(Refusal, match=r"no node of the Ray cluster has 65 CPU .*most that one has: 1 CPU"):
        next(executor.results([done]))
    executor.task_cpus, executor.task_bytes = 1, 1 << 60
    with pytest.raises(Refusal, match="no node of the Ray cluster has 1 CPU and 1,152,921,504,606,846,976 bytes"):
        next(executor.results([done]))


RUN = """
import sys
from pathlib import Path
from dataio.ray_executor import RayCluster
from dataio.stages import Workspace
from tests.dataio.test_stages import stage_of

folder = Path(sys.argv[2])
with RayCluster(folder, sys.argv[1]) as executor:
    print("begun", flush=True)
    Workspace(folder).run(stage_of(folder, 12, seconds=0.3), executor)
"""


@pytest.mark.verify
def test_a_run_that_is_killed_ends_with_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    Workspace(tmp_path / "whole").run(stage_of(tmp_path / "whole", 12), LocalPool(1))
    folder, killed = tmp_path / "killed", 0
    for until in (1, 5, 9, 99):
        run = python(RUN, cluster.address, folder)
        while run.poll() is None and not ((folder / "calls").exists() and len(calls_of(folder)) >= until):
            time.sleep(0.01)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            killed += 1
        run.wait()
    assert run.returncode == 0 and killed == 3
    found = {name: data for name, data in files(folder).items() if not name.startswith(".")}
    assert found == files(tmp_path / "whole")
