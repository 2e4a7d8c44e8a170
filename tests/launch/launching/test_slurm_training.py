"""`stoker launch slurm` on a real Slurm: two nodes train, save when the scheduler asks, and go on where they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.commands_launch import launch
from pretrain import events
from pretrain.attempt import ExitClass, read_exit
from pretrain.config import load
from pretrain.rundir import attempt_path, attempts, committed_steps
from tests.launch import jobs
from tests.launch.launching.slurm_cluster import Cluster, until
from tests.launch.tiny import fixed, tiny
from tests.parity.pool import Pool

#: Seconds on two quiet cores are a tenth of these limits, which are for a machine that does other things as well.
pytestmark = pytest.mark.timeout(900)
START_S, END_S = 240, 300

CPU = ["--hardware", "cpu", "--ranks-per-node", "1"]
#: What takes time is the start: a small model, and no process that waits for a fault.
LAYERS = ["attention/dense"]
QUICK = ["launch.warm_spares=false"]


def ask(*words: str) -> Result:
    return CliRunner().invoke(launch, ["slurm", *words])


def submitted(config: Path, nodes: int, *overrides: str) -> tuple[str, Path]:
    """The number of the job and the run directory."""
    said = ask(str(config), *QUICK, *overrides, *CPU, "--nodes", str(nodes))
    assert said.exit_code == 0, said.output + str(said.exception)
    return said.stdout.split()[1].rstrip(":"), load(config).run_dir


def begun(run_dir: Path, steps: int) -> None:
    """Wait until a run has taken so many steps."""
    until(lambda: (run_dir / "metrics.jsonl").exists() and len(events.read(run_dir)) >= steps, START_S)


def ended(cluster: Cluster, job: str) -> str:
    """How the job ended, once it has."""
    until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "?"), END_S)
    return cluster.state(job)


def output(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run_dir.glob("launch/*/slurm-*.log")))


def outcome(run_dir: Path) -> list[ExitClass | None]:
    found = [read_exit(attempt_path(run_dir, number)) for number in attempts(run_dir)]
    return [one.exit_class if one else None for one in found]


@pytest.mark.verify
def test_two_nodes_save_at_the_notice_are_queued_again_and_end_bit_equal(
    cluster: Cluster, pool: Pool, tmp_path: Path
) -> None:
    config = tiny(tmp_path, LAYERS, steps=150)
    job, run_dir = submitted(config, 2, "checkpoint.every=1000")
    begun(run_dir, 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert ended(cluster, job) == "COMPLETED", output(run_dir)
    assert outcome(run_dir) == [ExitClass.PREEMPTED, ExitClass.DONE], output(run_dir)
    saved = committed_steps(run_dir)
    assert len(saved) == 2 and 3 <= saved[0] < 150 and saved[1] == 150
    assert json.loads((run_dir / "plan.json").read_bytes())["plan"]["world_size"] == 2
    written = json.loads((run_dir / "launch/0001/submission.json").read_bytes())
    assert (written["scheduler"], written["job"]) == ("slurm", job)

    assert pool.run(2, jobs.run, str(config), ["run.name=undisturbed", "checkpoint.every=1000"]) == ["done"] * 2
    assert fixed(run_dir) == fixed(run_dir.parent / "undisturbed")


def test_a_cancelled_run_has_saved(cluster: Cluster, tmp_path: Path) -> None:
    job, run_dir = submitted(tiny(tmp_path, LAYERS, steps=20_000), 2, "checkpoint.every=100000")
    begun(run_dir, 3)
    cluster.run("scancel", job)
    assert ended(cluster, job) == "CANCELLED"
    until(lambda: outcome(run_dir) == [ExitClass.PREEMPTED], END_S)
    assert committed_steps(run_dir) and "queued again" not in output(run_dir)


@pytest.mark.verify
def test_one_node_trains_to_the_end_and_the_next_launch_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    config = tiny(tmp_path, LAYERS, steps=4)
    job, run_dir = submitted(config, 1, "run.steps=3")
    assert ended(cluster, job) == "COMPLETED", output(run_dir)
    again, _ = submitted(config, 1, "run.allow_change=[run.steps]")
    assert ended(cluster, again) == "COMPLETED", output(run_dir)
    assert outcome(run_dir) == [ExitClass.DONE] * 2 and committed_steps(run_dir)[-1] == 4
    said = ask(str(config), "run.seed=9", *CPU, "--nodes", "1")
    assert "run.seed" in str(said.exception) and not (run_dir / "launch/0003").exists()


@pytest.mark.verify
def test_slurms_own_notice_comes_before_the_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    limits = ("launch.time_limit_min=3", "launch.signal_s=60", "checkpoint.every=1000000")
    job, run_dir = submitted(tiny(tmp_path, LAYERS, steps=1_000_000), 2, *limits)
    begun(run_dir, 3)
    until(lambda: len(attempts(run_dir)) >= 2, 2 * END_S)
    cluster.run("scancel", job)
    assert ended(cluster, job) == "CANCELLED"
    assert outcome(run_dir)[0] is ExitClass.PREEMPTED
    assert committed_steps(run_dir), output(run_dir)
