"""Against a real Slurm of four virtual nodes: what the script does with signals and codes, arrays, and refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.launching import slurm
from launch.launching.folder import Folder
from launch.launching.slurm import require_slurm, submit_array
from launch.launching.where import expand
from pretrain.config_sections import LaunchSection
from stoker.errors import Refusal
from tests.launch.launching.jobs import prepared, tree
from tests.launch.launching.slurm_cluster import Cluster, until
from tests.launch.tiny import tiny

#: A run in a few lines: notes its start, and ends with the code of its first argument once it is told to, or at its
#: second start at once with 0.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
told = lambda number, frame: (note(signal.Signals(number).name), sys.exit(int(sys.argv[1])))
def note(text):
    with open("notes", "a") as file:
        file.write(text + "\\n")
signal.signal(signal.SIGUSR1, told)
signal.signal(signal.SIGTERM, told)
note(f"start {os.environ.get('SLURM_RESTART_COUNT', 0)}")
if int(os.environ.get("SLURM_RESTART_COUNT", 0)):
    sys.exit(0)
time.sleep(60)
"""

#: A task of an array: writes the words it was given to a file of its index.
TASK = """
import json, os, sys
open(f"{sys.argv[1]}/{os.environ['SLURM_ARRAY_TASK_ID']}", "w").write(json.dumps(sys.argv[2:]))
"""


def batch(cluster: Cluster, folder: Path, code: int) -> str:
    (folder / "program.py").write_text(PROGRAM)
    argv = ["sbatch", "--parsable", "--requeue", "--open-mode=append", f"--chdir={folder}", "--output=out.log"]
    number = cluster.run(*argv, str(slurm.script_path()), f"{folder}/", sys.executable, "program.py", str(code)).strip()
    until(lambda: (folder / "notes").exists(), 20)
    return number


def notes(folder: Path) -> list[str]:
    return (folder / "notes").read_text().split("\n")[:-1]


def test_a_notice_before_the_time_limit_ends_in_another_start(cluster: Cluster, tmp_path: Path) -> None:
    number = batch(cluster, tmp_path, 4)
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    until(lambda: cluster.state(number) == "COMPLETED", 40)
    assert notes(tmp_path) == ["start 0", "SIGUSR1", "start 1"]
    assert "queued again" in (tmp_path / "out.log").read_text()


def test_a_cancelled_job_saves_and_stays_ended(cluster: Cluster, tmp_path: Path) -> None:
    number = batch(cluster, tmp_path, 4)
    cluster.run("scancel", number)
    until(lambda: cluster.state(number) == "CANCELLED" and len(notes(tmp_path)) > 1, 20)
    assert notes(tmp_path)[0] == "start 0" and set(notes(tmp_path)[1:]) <= {"SIGUSR1", "SIGTERM"}
    assert "queued again" not in (tmp_path / "out.log").read_text()


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_run_that_must_not_go_on_is_not_queued_again(cluster: Cluster, tmp_path: Path, code: int) -> None:
    number = batch(cluster, tmp_path, code)
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    until(lambda: cluster.state(number) == "FAILED", 20)
    assert notes(tmp_path) == ["start 0", "SIGUSR1"]
    assert f"ExitCode={code}:0" in cluster.run("scontrol", "show", "job", number)


#: A node of a launch: the last one hangs, the others end well once they are told to, and the first says so if asked.
NODE = """
import os, sys, time
from pathlib import Path
index = int(os.environ["SLURM_NODEID"])
Path(f"begun_{index}").touch()
while not Path("go").exists():
    time.sleep(0.1)
if index == 2:
    time.sleep(600)
if index == 0 and sys.argv[1:]:
    Path(f"{sys.argv[1]}{os.environ['SLURM_JOB_ID']}-0.ended").write_text("0\\n")
"""


@pytest.mark.parametrize("recorded", [True, False])
def test_a_lost_node_costs_a_run_that_a_spare_finished_nothing(
    cluster: Cluster, tmp_path: Path, recorded: bool
) -> None:
    """Without the nodes' own word the job fails: srun's code is that of the lost node."""
    (tmp_path / "node.py").write_text(NODE)
    folder = "" if recorded else "none"  # where a launch has begun its own word is waited for
    argv = ["sbatch", "--parsable", "--nodes=3", "--ntasks-per-node=1", "--no-kill", "--no-requeue"]
    argv += [f"--chdir={tmp_path}", "--output=out.log", str(slurm.script_path()), f"{tmp_path / folder}/1-"]
    argv += ["srun", "--mpi=none", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0", "--input=none", "--no-kill"]
    number = cluster.run(*argv, sys.executable, "node.py", *([f"{tmp_path}/1-"] if recorded else [])).strip()
    until(lambda: len(list(tmp_path.glob("begun_*"))) == 3, 60)
    nodes = re.search(r" NodeList=(\S+)", cluster.run("scontrol", "show", "job", number))
    assert nodes is not None
    lost = expand(nodes[1])[2]
    try:
        cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=lost")
        (tmp_path / "go").touch()
        until(lambda: cluster.state(number) not in ("RUNNING", "COMPLETING"), 60)
        assert cluster.state(number) == ("COMPLETED" if recorded else "FAILED"), (tmp_path / "out.log").read_text()
    finally:
        cluster.run("scontrol", "update", f"nodename={lost}", "state=resume")
        until(lambda: "idle" in cluster.run("sinfo", "--noheader", f"--nodes={lost}", "--format=%t"), 30)


def test_an_array_runs_every_index_with_its_words_as_they_are(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    words = ["$(touch x)", "a  b", "'\"", "%j", "#SBATCH --nodes=9"]
    (folder / "task.py").write_text(TASK)
    argv = [sys.executable, str(folder / "task.py"), str(folder), *words]
    number = submit_array(argv, folder, [3, 1, 2, 7], 2, LaunchSection(), 1, 0)
    until(lambda: {"1", "2", "3", "7"} <= set(tree(folder)), 40)
    until(lambda: not cluster.run("squeue", "--noheader", "--job", number), 20)
    assert all(json.loads((folder / index).read_text()) == words for index in "1237")
    assert json.loads((folder / f"array-{number}.json").read_text())["indices"] == [3, 1, 2, 7]


def test_output_lies_where_it_was_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "50%j done %% '$(x)' é"
    folder.mkdir()
    output = slurm._pattern(folder / "slurm-%j.log")
    number = cluster.run(
        "sbatch", "--parsable", f"--output={output}", str(slurm.script_path()), "-", "echo", "$0 `x`"
    ).strip()
    path = folder / f"slurm-{number}.log"
    until(lambda: path.exists() and path.read_text() == "$0 `x`\n", 20)


@pytest.mark.parametrize(
    ("section", "nodes", "said"),
    [
        ({"partition": "bacth"}, 1, "did you mean batch.*batch \\(4 nodes\\)"),
        ({"partition": "small"}, 2, "2 nodes"),
        ({}, 5, "5 nodes"),
    ],
)
def test_this_cluster_cannot(cluster: Cluster, section: dict[str, str], nodes: int, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        require_slurm(LaunchSection(**section), nodes)


def test_what_slurm_refuses_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    config = str(tiny(tmp_path))
    ready = prepared("launch.time_limit_min=6000", config=config, hardware="cpu", nodes=2, ranks=1)
    with pytest.raises(Refusal, match="nothing was submitted"):
        slurm.submit(ready, Folder.next(ready.config.run_dir))  # longer than the partition allows
    assert not ready.config.run_dir.exists() and not cluster.run("squeue", "--noheader", "--name=tiny")


def test_a_controller_that_is_gone_is_named(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (cluster.folder / "slurm.conf").read_text()
    other = tmp_path / "slurm.conf"
    other.write_text("".join(f"{line}\n" for line in text.splitlines() if not line.startswith("SlurmctldPort")))
    monkeypatch.setenv("SLURM_CONF", str(other))
    monkeypatch.setattr(slurm, "ASK_S", 3)
    with pytest.raises(Refusal, match="answer"):
        require_slurm(LaunchSection(), 1)


@pytest.mark.parametrize("listed", ["n[08-11,7],x,a[1-2]b[3,05-06]", "gpu-[001-003]-r[9-10]", "one", "n[0-0]"])
def test_node_lists_are_read_as_slurm_reads_them(cluster: Cluster, listed: str) -> None:
    said = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    assert expand(listed) == said.stdout.split()
