"""The verdict over nodes, as a function of what they state."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.preflight.compare import Offset, judge, slow
from launch.preflight.facts import Facts
from launch.preflight.report import Verdict
from stoker.errors import Refusal

SILENCE = "did not answer"


def fact(node: str, **changes: object) -> Facts:
    plain = Facts(
        host=node,
        place=f"place of {node}",
        versions={"stoker": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1"},
        hashes={"code": "c" * 64, "configuration": "k" * 64},
        remarks={"driver": "580.95.05"},
        rates={"products": 1e12},
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def verdict(*given: Facts, needed: int | None = None, **more: object) -> Verdict:
    nodes = [one.host for one in given]
    return judge(nodes, needed or len(nodes), {one.host: one for one in given}, {}, SILENCE, **more)  # type: ignore[arg-type]


def test_equal_nodes_are_all_good_in_the_jobs_order() -> None:
    found = verdict(fact("c"), fact("a"), fact("b"))
    assert found.good == ("c", "a", "b") and not found.excluded and not found.warnings and found.trouble is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"versions": {"torch": "2.12.1"}}, "torch 2.12.1 where 3 of 4 nodes have 2.13.0"),
        ({"versions": {"megatron-core": None}}, "megatron-core none where 3 of 4 nodes have 0.16.1"),
        ({"hashes": {"code": "d" * 64}}, "code dddddddddddd where 3 of 4 nodes have cccccccccccc"),
        ({"hashes": {"configuration": "e" * 64}}, "configuration eeeeeeeeeeee where 3 of 4 nodes have kkkkkkkkkkkk"),
    ],
)
@pytest.mark.parametrize("odd", [0, 2])
def test_a_node_that_differs_is_excluded_by_name_and_reason(
    change: dict[str, dict[str, str]], reason: str, odd: int
) -> None:
    nodes = [fact(name) for name in "abcd"]
    (field, values), *_ = change.items()
    nodes[odd] = replace(nodes[odd], **{field: {**getattr(nodes[odd], field), **values}})  # type: ignore[arg-type]
    found = verdict(*nodes, needed=3)
    assert found.excluded == {"abcd"[odd]: reason}
    assert len(found.good) == 3 and found.trouble is None, "a spare takes its place, also the leader's"


def test_of_two_nodes_the_leader_is_right_and_too_few_are_left() -> None:
    found = verdict(fact("a"), fact("b", hashes={"code": "d" * 64, "configuration": "k" * 64}))
    assert found.good == ("a",)
    assert found.trouble == (
        "1 of 2 nodes can train and 2 are needed; b: code dddddddddddd where 1 of 2 nodes have cccccccccccc"
    )


def test_a_version_says_more_than_a_hash() -> None:
    odd = fact("b", versions={"torch": "2.12.1"}, hashes={"code": "x", "configuration": "y"})
    assert "torch 2.12.1" in verdict(fact("a"), odd, fact("c"), needed=2).excluded["b"]


def test_silent_and_refused_nodes_are_excluded_and_have_no_vote() -> None:
    given = {node: fact(node) for node in "ab"} | {"c": fact("c", refused="/dev/shm: 3 MiB free")}
    found = judge(["a", "b", "c", "d"], 2, given, {}, SILENCE)
    assert found.excluded == {"c": "/dev/shm: 3 MiB free", "d": SILENCE} and found.good == ("a", "b")


def test_half_of_the_nodes_are_no_majority() -> None:
    """Of two nodes on paths of their own each would find itself good, and both would train."""
    found = judge(["a", "b"], 1, {"a": fact("a")}, {}, SILENCE)
    assert found.trouble == "1 of 2 nodes found one another, which is no majority; b: did not answer"
    assert judge(["a", "b", "c"], 1, {"a": fact("a"), "c": fact("c")}, {}, SILENCE).trouble is None


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (Offset(3599.8, 3600.2), "its clock is at least 3599.8 s ahead of the leader's"),
        (Offset(-90.0, -1.2), "its clock is at least 1.2 s behind the leader's"),
        (Offset(-0.2, 0.3), None),
        (Offset(-4.0, 5.0), None),  # a file system that shows changes late cannot tell
    ],
)
def test_a_clock_is_refused_only_where_it_is_surely_wrong(offset: Offset, reason: str | None) -> None:
    given = {node: fact(node) for node in "abc"}
    found = judge(list("abc"), 2, given, {"b": offset}, SILENCE)
    assert (reason in found.excluded["b"]) if reason else not found.excluded


def test_one_host_started_twice_is_excluded_unless_hosts_may_be_shared() -> None:
    nodes = fact("a"), fact("b", place="place of a"), fact("c")
    assert "is the same host as a" in verdict(*nodes, needed=2).excluded["b"]
    shared = verdict(*nodes, share_hosts=True)
    assert not shared.excluded and "is the same host as a" in shared.warnings[0]


def test_hosts_are_told_apart_by_their_gpus_where_they_have_some() -> None:
    """Two pods on one host with GPUs of their own are two nodes; with one in common they are one too many."""
    apart = fact("a", devices=("G0", "G1")), fact("b", place="place of a", devices=("G2", "G3")), fact("c")
    assert not verdict(*apart).excluded
    both = fact("a", devices=("G0", "G1")), fact("b", devices=("G1", "G2")), fact("c")
    assert "has a GPU that a has as well" in verdict(*both, needed=2).excluded["b"]


def test_a_segment_is_one_nvlink_partition() -> None:
    cliques = {"a": "1", "b": "1", "c": "1", "d": "2", "e": "2", "f": "2"}
    nodes = [fact(node, clique=("uuid", clique)) for node, clique in cliques.items()]
    assert not verdict(*nodes, segment=3).excluded, "two segments may lie in two racks"
    mixed = [fact(node, clique=("uuid", "9" if node == "e" else clique)) for node, clique in cliques.items()]
    assert "uuid clique 9 where 2 nodes of its segment have uuid clique 2" in verdict(*mixed, segment=3).excluded["e"]


def test_remarks_warn_and_exclude_nobody() -> None:
    found = verdict(fact("a"), fact("b"), fact("c", remarks={"driver": "570.1"}))
    assert not found.excluded and found.warnings == ("c: driver 570.1 where 2 of 3 nodes have 580.95.05",)


def test_slow_nodes_give_way_to_spares_the_slowest_first() -> None:
    rates = {"a": 1.0, "b": 0.5, "c": 0.99, "d": 1.01, "e": 0.3, "f": 1.0, "g": 1.0}
    nodes = [fact(node, rates={"products": rate}) for node, rate in rates.items()]
    found = verdict(*nodes, needed=6)
    assert found.excluded == {"e": "slow: products at 30% of the other nodes'"}
    assert found.warnings == ("b: slow: products at 50% of the other nodes'; no node is left to take its place",)


@given(st.lists(st.floats(0.9, 1.1), min_size=2, max_size=40))
def test_no_node_within_ten_per_cent_is_called_slow(rates: list[float]) -> None:
    assert slow({str(i): rate for i, rate in enumerate(rates)}) == {}


@given(st.lists(st.floats(0.97, 1.03), min_size=4, max_size=40), st.floats(0.05, 0.7))
def test_a_node_at_seven_tenths_is_always_called_slow(rates: list[float], rate: float) -> None:
    named = {str(i): value for i, value in enumerate(rates)} | {"bad": rate}
    assert set(slow(named)) == {"bad"}


def test_facts_survive_the_file_and_other_values_are_refused() -> None:
    odd = fact("a", clique=("uuid", "2"), devices=("G0",))
    assert Facts.from_dict(odd.to_dict()) == odd and Facts.from_dict(fact("b").to_dict()) == fact("b")
    for wrong in (None, [], {}, {"host": "a"}, {**odd.to_dict(), "unknown": 1}):
        with pytest.raises(Refusal, match="not the facts of a node"):
            Facts.from_dict(wrong)
