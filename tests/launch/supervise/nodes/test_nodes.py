"""Several nodes act as one: they begin together, replace what is lost, and no two parts of a launch ever both go on."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from launch.supervise import causes, journal
from launch.supervise.places import Role, assign
from pretrain.attempt import ExitClass, read_exit
from pretrain.rundir import attempt_path
from tests.launch.supervise.nodes.agents import Launch, launched, until


class Placed:
    def __init__(self, domain: int | None = None, spare: bool = False) -> None:
        self.domain, self.spare = domain, spare


def roles(text: str) -> list[Role]:
    """``"aaA bbB"``: domains a and b; capitals are spares."""
    return [Placed(ord(c.lower()), c.isupper()) for c in text if c != " "]


@pytest.mark.parametrize(
    ("nodes", "ready", "before", "faults", "expected"),
    [
        ("aaa", {0, 1, 2}, {}, {}, {0: 0, 1: 1, 2: 2}),
        ("aaaA", {0, 2, 3}, {}, {}, {0: 0, 1: 3, 2: 2}),  # a spare takes the place of the one that is missing
        ("aaaA", {0, 1, 2, 3}, {0: 0, 1: 3, 2: 2}, {}, {0: 0, 1: 3, 2: 2}),  # who came back later is the spare now
        ("aaaA", {0, 1, 2}, {0: 0, 1: 3, 2: 2}, {}, {0: 0, 1: 1, 2: 2}),
        ("aaA bbB", {0, 1, 2, 4, 5}, {}, {}, {0: 0, 1: 1, 2: 5, 3: 4}),  # of its own NVLink domain
        ("aaA bb", {0, 1, 2, 4}, {}, {}, None),  # a spare of another domain does not do
        ("aa", {0}, {0: 0, 1: 1}, {}, None),
        ("aaA", {0, 1, 2}, {0: 0, 1: 1}, {1: 2}, {0: 0, 1: 2}),  # two faults of its own
        ("aaA", {0, 1}, {0: 0, 1: 1}, {1: 5}, {0: 0, 1: 1}),  # but nobody else is left
        ("aaA", {0, 1, 2}, {0: 0, 1: 1}, {1: 1}, {0: 0, 1: 1}),
    ],
)
def test_places_are_kept_and_filled_inside_their_domain(
    nodes: str, ready: set[int], before: dict[int, int], faults: dict[int, int], expected: dict[int, int] | None
) -> None:
    assert assign(roles(nodes), ready, before, faults) == expected


def test_every_place_is_filled_wherever_each_domain_has_nodes_enough() -> None:
    nodes = roles("aaA bbB")
    befores: list[dict[int, int]] = [{}, {0: 0, 1: 1, 2: 3, 3: 4}, {0: 2, 1: 0, 2: 3, 3: 5}, {0: 1, 1: 2, 2: 5, 3: 4}]
    for before, trusted, there in product(befores, product((0, 2), repeat=6), product((False, True), repeat=6)):
        ready = {node for node in range(6) if there[node]}
        found = assign(nodes, ready, before, dict(enumerate(trusted)))
        enough = len(ready & {0, 1, 2}) >= 2 and len(ready & {3, 4, 5}) >= 2
        assert (found is not None) == enough, (before, trusted, ready)
        if found is not None:
            assert len(set(found.values())) == 4 and set(found.values()) <= ready
            assert all(nodes[node].domain == nodes[(0, 1, 3, 4)[place]].domain for place, node in found.items())


def test_ten_thousand_devices_are_placed_at_once() -> None:
    many = roles("a" * 2400 + "A" * 100)
    ready = set(range(2500)) - set(range(0, 2400, 30))
    found = assign(many, ready, {place: place for place in range(2400)}, {})
    assert found is not None and len(set(found.values())) == 2400 and set(found.values()) <= ready


def everybody(launch: Launch, count: int) -> bool:
    return len(launch.places()) == count


def test_all_begin_in_the_order_of_the_job_and_end_together(tmp_path: Path) -> None:
    with launched(tmp_path / "run", 3) as launch:
        until(lambda: everybody(launch, 3))
        assert launch.places() == {0: 0, 1: 1, 2: 2}
        met = launch.agents[1].running
        assert met is not None and (met.first_rank, met.world_size, met.attempt) == (2, 6, 1)
        assert len({agent.running.master for agent in launch.agents if agent.running}) == 1
        for agent in launch.agents:
            agent.fault = causes.DONE
        until(lambda: all(agent.ended for agent in launch.agents))
        assert {agent.ended.code for agent in launch.agents if agent.ended} == {0}


def test_a_fault_on_one_node_starts_all_again_and_is_told_of(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(run, 3) as launch:
        until(lambda: everybody(launch, 3))
        launch.agents[2].fault = causes.fault("signal", "rank 5 was killed by SIGKILL", rank=5, host="n2")
        until(lambda: all(agent.met[-1][0] == 2 for agent in launch.agents), 5.0)
        ended = read_exit(attempt_path(run, 1))
        assert ended is not None and (ended.exit_class, ended.kind, ended.rank) == (ExitClass.FAULT, "signal", 5)
    events = [line["event"] for line in journal.read(run)]
    assert "fault" in events


def test_a_lost_node_is_replaced_by_the_spare_in_its_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(run, 4, spares=[3]) as launch:
        until(lambda: everybody(launch, 3))
        launch.die(1)
        took = until(lambda: launch.places() == {0: 0, 1: 3, 2: 2}, 10.0)
        assert took < 6.0
        ended = read_exit(attempt_path(run, 1))
        assert ended is not None and ended.kind == "node" and ended.host == "n1"


def test_where_the_leading_node_is_lost_another_leads_and_decides(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(run, 4, spares=[3]) as launch:
        until(lambda: everybody(launch, 3))
        launch.die(0)
        took = until(lambda: launch.places() == {0: 3, 1: 1, 2: 2}, 15.0)
        assert took < 10.0
        attempts = [agent.met[-1][0] for agent in launch.agents[1:]]
        assert attempts == [2, 2, 2]
        ended = read_exit(attempt_path(run, 1))
        assert ended is not None and ended.kind == "node"


@pytest.mark.parametrize("one_way", [False, pytest.param(True, marks=pytest.mark.verify)])
def test_of_a_launch_cut_in_two_only_the_larger_part_goes_on(tmp_path: Path, one_way: bool) -> None:
    with launched(tmp_path / "run", 5, spares=[3, 4]) as launch:
        until(lambda: everybody(launch, 3))
        launch.cut([0, 1], one_way=one_way)
        until(lambda: launch.places() in ({0: 3, 1: 4, 2: 2}, {0: 4, 1: 3, 2: 2}), 15.0)
        assert launch.agents[0].running is None and launch.agents[1].running is None
        launch.cut([0, 1], is_cut=False)
        # Healed, they wait as spares and disturb nobody.
        running = launch.agents[2].running
        until(lambda: launch.agents[0].node._member.connected and launch.agents[1].node._member.connected, 10.0)
        assert launch.agents[2].running is running


def test_two_halves_of_which_none_is_larger_both_wait_until_they_are_one_again(tmp_path: Path) -> None:
    with launched(tmp_path / "run", 4) as launch:
        until(lambda: everybody(launch, 4))
        launch.cut([0, 1])
        until(lambda: not launch.places(), 10.0)
        launch.cut([0, 1], is_cut=False)
        until(lambda: everybody(launch, 4), 15.0)
        assert {agent.met[-1][0] for agent in launch.agents} == {2}


def test_the_same_failure_twice_ends_the_launch_on_every_node(tmp_path: Path) -> None:
    with launched(tmp_path / "run", 3, spares=[2]) as launch:
        for attempt in (1, 2):
            until(lambda: all(a.running and a.running.attempt == attempt for a in launch.agents[:2]))  # noqa: B023
            launch.agents[1].fault = causes.fault(
                "exception", "ValueError: x", rank=2, fingerprint="ValueError, step 3"
            )
        until(lambda: all(agent.ended for agent in launch.agents), 10.0)
        assert {agent.ended.code for agent in launch.agents if agent.ended} == {1}
        assert all("the same failure twice" in agent.ended.text for agent in launch.agents if agent.ended)


def test_asked_to_end_before_the_ranks_begin_nothing_is_started(tmp_path: Path) -> None:
    with launched(tmp_path / "run", 3) as launch:
        until(lambda: everybody(launch, 3))
        launch.die(2)  # without a spare the others wait for it
        until(lambda: not launch.places(), 10.0)
        launch.agents[0].asked = launch.agents[1].asked = True
        until(lambda: launch.agents[0].ended is not None and launch.agents[1].ended is not None, 10.0)
        assert {agent.ended.code for agent in launch.agents if agent.ended} == {4}


def test_a_stranger_is_not_listened_to(tmp_path: Path) -> None:
    import socket

    with launched(tmp_path / "run", 2) as launch:
        until(lambda: everybody(launch, 2))
        port = launch.agents[0].node._facts.ports[0]
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"0" * 32 + b"\n" + b"0" * 64 + b" " + json.dumps({"join": 1}).encode() + b"\n")
            stranger.settimeout(5)
            said = b""
            while data := stranger.recv(4096):
                said += data
        assert said.count(b"\n") == 1, "the random number of the connection, and nothing after it"
        assert everybody(launch, 2)
