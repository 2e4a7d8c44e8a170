"""Every node of a job knows which one it is, from Slurm's variables and from JobSet's."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.launching.job import Job
from launch.launching.kubernetes import submission
from launch.launching.where import expand, where
from stoker.errors import Refusal
from tests.launch.launching.jobs import on_slurm, prepared


def job(nodes: int = 3, **changed: object) -> Job:
    found = on_slurm(prepared("parallel={ep: 8}", hardware="h100", nodes=nodes)).job
    return dataclasses.replace(found, **changed)  # type: ignore[arg-type]


def slurm(index: int, listed: str = "localhost,127.0.0.[2-3]", **more: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": "71", "SLURM_NODEID": str(index), "SLURM_JOB_NODELIST": listed, **more}


def test_slurm_nodes_know_their_place_and_their_start() -> None:
    found = [where(job(), slurm(index)) for index in range(3)]
    assert [one.host for one in found] == ["localhost", "127.0.0.2", "127.0.0.3"]
    assert {(one.start, one.comes_back) for one in found} == {("1-71-0", False)}
    assert where(job(), slurm(0, SLURM_RESTART_COUNT="2")).start == "1-71-2"
    assert where(job(number=12), slurm(0)).start == "12-71-0", "a cluster may begin to count anew"


def test_jobset_nodes_know_their_place_in_and_over_domains() -> None:
    overrides = ("parallel={ep: 64}", "launch.spare_nodes=2", "launch.container=image", "launch.volume_claim=runs")
    two = submission(prepared(*overrides, nodes=32)).job
    environment = {"STOKER_DOMAIN": "1", "JOB_COMPLETION_INDEX": "16", "STOKER_START": "3", "STOKER_SET": "6f-e1"}
    found = where(two, environment)
    assert found.index == 33 and two.roles()[33].spare and (found.start, found.comes_back) == ("6f-e1-3", True)
    for older in ({**environment, "STOKER_SET": ""}, {"JOB_COMPLETION_INDEX": "16"}):
        with pytest.raises(Refusal, match=r"JobSet 0\.9"):
            where(two, older)
    assert found.host == "hybrid-moe-30b-a3b-node-1-16.hybrid-moe-30b-a3b" == found.hosts[-1]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "neither Slurm"),
        (slurm(0, "localhost"), "gave 1 nodes"),
        (slurm(7), "number 7"),
        (slurm(0, "localhost,127.0.0.1,no-such-host-anywhere.invalid"), "no-such-host-anywhere.invalid"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        where(job(), environment)


def test_one_node_needs_no_scheduler() -> None:
    assert where(job(1), {}).index == 0


@given(st.lists(st.tuples(st.sampled_from(["n", "node-", "gpu.x"]), st.integers(0, 5), st.integers(0, 99)), max_size=9))
def test_a_list_of_plain_names_is_itself(parts: list[tuple[str, int, int]]) -> None:
    hosts = [f"{name}{'0' * zeros}{number}" for name, zeros, number in parts]
    assert expand(",".join(hosts)) == hosts


@pytest.mark.parametrize("listed", ["n[1-999999999]", "n[a-b]", "n[1-]", "n[-3]"])
def test_a_damaged_node_list_is_refused(listed: str) -> None:
    with pytest.raises(Refusal, match="node list"):
        expand(listed)
