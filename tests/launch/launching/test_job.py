"""What a request comes to: the layout fills the nodes, or the refusal says what would; a job reads back as written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.launching.job import PORTS, Job, Role, port
from launch.launching.values import SECRETS, overrides
from pretrain.config import load, parse
from stoker.errors import Refusal
from stoker.yaml_core import parse_yaml
from tests.launch.launching.jobs import PRESET, on_slurm, prepared
from tests.launch.tiny import tiny


def test_gb200_nodes_run_four_ranks_in_segments_of_sixteen() -> None:
    ready = prepared("parallel={ep: 64}", nodes=32)
    job = on_slurm(ready).job
    assert (job.nodes, job.ranks_per_node, job.ranks_per_numa, job.segment, job.domains) == (32, 4, 2, 16, 2)
    assert job.plan["world_size"] == 128 and job.plan["ep"] == 64
    assert job.environment["NCCL_CUMEM_ENABLE"] == "1" and job.environment["NCCL_NET_GDR_C2C"] == "1"
    assert "imex" in job.checks[0]
    assert [job.bind(rank)[1] for rank in range(4)] == ["--cpunodebind=0"] * 2 + ["--cpunodebind=1"] * 2


def test_every_node_of_an_nvlink_domain_with_spares_has_its_role() -> None:
    job = on_slurm(prepared("parallel={ep: 64}", "launch.spare_nodes=2", nodes=32)).job
    assert job.all_nodes == 34 and job.segment_spares == 1
    roles = job.roles()
    assert [role.domain for role in roles] == [0] * 17 + [1] * 17
    assert [index for index, role in enumerate(roles) if role.spare] == [16, 33]


def test_spares_of_single_host_domains_come_last() -> None:
    job = on_slurm(prepared("parallel={ep: 8}", "launch.spare_nodes=1", hardware="h100", nodes=3)).job
    assert job.segment is None and job.ranks_per_numa == 4
    assert job.roles() == (Role(None, False),) * 3 + (Role(None, True),)


@pytest.mark.parametrize(("spares", "near"), [(3, "2 or 4"), (6, "4 or 2"), (1, "0 or 2")])
def test_spares_that_do_not_divide_the_domains_are_refused(spares: int, near: str) -> None:
    with pytest.raises(Refusal, match="spare_nodes") as refusal:
        prepared("parallel={ep: 64}", f"launch.spare_nodes={spares}", nodes=32)
    assert sorted(str(refusal.value).rpartition("choose ")[2].split(" or ")) == sorted(near.split(" or "))


def test_a_plan_that_does_not_match_the_nodes_is_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(Refusal) as refusal:
        prepared("parallel={ep: 64}", nodes=17)
    near = [int(word) for word in str(refusal.value).partition("nearest that fit are --nodes ")[2].split(" or ")]
    assert near[0] < 17 < near[1]
    for count in near:
        assert prepared("parallel={ep: 64}", nodes=count).settings.nodes == count
    for between in range(near[0] + 1, near[1]):
        with pytest.raises(Refusal):
            prepared("parallel={ep: 64}", nodes=between)


@pytest.mark.parametrize("nodes", [0, -1, 10**9])
def test_absurd_numbers_of_nodes_are_refused(nodes: int) -> None:
    with pytest.raises(Refusal, match="--nodes"):
        prepared(nodes=nodes)


def test_parallel_auto_is_decided_once_and_written_down(tmp_path: Path) -> None:
    ready = prepared("parallel=auto", f"run.dir={tmp_path}", nodes=16)
    assert load(PRESET, ["parallel=auto"]).parallel == "auto"
    assert ready.config.parallel != "auto"
    assert ready.config.plan(64).to_dict() == ready.plan.to_dict()
    submitted = on_slurm(ready)
    assert parse(parse_yaml(submitted.config, "x"), "x").plan(64).to_dict() == submitted.job.plan


def test_ranks_per_node_are_a_choice_only_without_accelerators(tmp_path: Path) -> None:
    config = str(tiny(tmp_path))
    assert on_slurm(prepared(config=config, hardware="cpu", nodes=3, ranks=2)).job.plan["world_size"] == 6
    with pytest.raises(Refusal, match="--ranks-per-node"):
        prepared(ranks=2)
    with pytest.raises(Refusal, match="--ranks-per-node 0"):
        prepared(config=config, hardware="cpu", nodes=1, ranks=0)


def test_secrets_travel_apart_from_what_is_written(tmp_path: Path) -> None:
    hidden = "https://hooks.example/canary-7fd1"
    ready = prepared(f"launch.webhook={hidden}", "data.blend={'s3://me:hunter22@web/x': 1}", f"run.dir={tmp_path}")
    submitted = on_slurm(ready)
    for text in (submitted.show(), submitted.config, submitted.job.to_json(), *submitted.argv):
        assert "canary" not in text and "hunter22" not in text
    assert set(ready.secrets) == {"launch.webhook", "data.blend"}
    path = tmp_path / "config.yaml"
    path.write_text(submitted.config)
    assert load(path, overrides(json.dumps(dict(ready.secrets)))) == ready.config
    with pytest.raises(Refusal, match=SECRETS):
        overrides("[1]")


def test_a_job_of_another_release_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    job = on_slurm(prepared()).job
    path = tmp_path / "launch.json"
    path.write_text(job.to_json())
    assert Job.read(path) == job
    path.write_text(job.to_json()[:-30])
    with pytest.raises(Refusal, match="damaged"):
        Job.read(path)
    path.write_text(json.dumps({**job.to_dict(), "format": {"name": "launch", "version": 99}}))
    with pytest.raises(Refusal, match="newer release"):
        Job.read(path)
    path.write_text(json.dumps({**job.to_dict(), "nodes": 15}))
    with pytest.raises(Refusal, match="plan has 64 ranks"):
        Job.read(path)
    with pytest.raises(Refusal, match="shared path"):
        Job.read(tmp_path / "absent.json")


@given(st.text(max_size=30), st.integers(1, 9999))
def test_ports_are_those_of_the_range_and_differ_by_launch(run_dir: str, number: int) -> None:
    assert port(Path(f"/{run_dir}"), number) in PORTS
    assert len({port(Path("/runs/x"), each) for each in range(1, 50)}) > 45
