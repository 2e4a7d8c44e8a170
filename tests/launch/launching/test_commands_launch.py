"""``stoker launch`` as a person meets it: what a dry run prints, and that it does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from launch.commands_launch import launch
from launch.launching.job import Job
from launch.launching.slurm import script_path
from stoker.errors import Refusal
from tests.launch.launching.jobs import PRESET, tree

IN_PODS = ["launch.container=ghcr.io/x/stoker:1", "launch.volume_claim=runs"]


def ask(*words: str) -> Result:
    return CliRunner().invoke(launch, list(words), catch_exceptions=False)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no scheduler to ask
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")


def test_a_dry_run_on_slurm_prints_argv_script_job_and_configuration(tmp_path: Path) -> None:
    said = ask("slurm", PRESET, "--hardware", "gb200-nvl72", "--nodes", "16", "--dry-run").stdout
    assert tree(tmp_path) == [] and "canary" not in said
    assert said.startswith("# argv of sbatch\n[")
    argv, end = json.JSONDecoder().raw_decode(said, said.index("["))
    assert argv[0] == "sbatch" and "--segment=16" in argv
    assert script_path().read_text().rstrip() in said
    values, _ = json.JSONDecoder().raw_decode(said, said.index("{\n", end + len(script_path().read_text())))
    job = Job.from_dict(values)
    assert (job.nodes, job.run_dir) == (16, str(tmp_path / "runs" / PRESET))
    assert argv[-1] == str(Path(job.config).with_name("launch.json")) and f"# {job.config}\n" in said


def test_a_dry_run_on_kubernetes_prints_manifests_and_nothing_else(tmp_path: Path) -> None:
    words = ["--hardware", "gb200-nvl72", "--nodes", "16", "--secret", "WANDB_API_KEY=wandb/key", "--dry-run"]
    said = ask("kubernetes", PRESET, *IN_PODS, *words).stdout
    assert tree(tmp_path) == [] and "canary" not in said
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(said)]
    assert kinds == ["ConfigMap", "ComputeDomain", "JobSet"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm", PRESET, "--hardware", "gb200", "--nodes", "2"], "Did you mean gb200-nvl72"),
        (["slurm", PRESET, "--hardware", "h100", "--nodes", "0"], "--nodes 0"),
        (["slurm", PRESET, "--hardware", "h100", "--nodes", "2", "train.lrr=1"], "train.lr"),
        (["slurm", PRESET, "--hardware", "h100", "--nodes", "2", "run.name='a\nb'"], "run.name"),
        (["slurm", PRESET, "--hardware", "h100", "--nodes", "2", 'launch.partition="a\\nb"', "--dry-run"], "control"),
        (["slurm", PRESET, "--hardware", "h100", "--nodes", "2"], "sbatch is not on this machine|token store"),
        (["kubernetes", PRESET, "--hardware", "h100", "--nodes", "2", *IN_PODS], "kubectl is not on this machine"),
    ],
)
def test_what_cannot_be_launched_is_one_message_and_nothing_is_written(
    tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(Refusal, match=said) as refusal:
        ask(*words)
    assert "\n" not in str(refusal.value) and tree(tmp_path) == []
