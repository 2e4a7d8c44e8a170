"""A node's connection to the launch: what it says last is heard, and a name that does not resolve yet costs nothing."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from launch.launching.where import PULLING_S, Where
from launch.supervise import causes, journal, nodes
from launch.supervise.leader import REJOIN_S, Facts
from launch.supervise.member import listening_address
from pretrain.config import load
from tests.launch.launching.jobs import prepared
from tests.launch.supervise.nodes.agents import launched, until
from tests.launch.tiny import tiny

#: More than the kernels on both sides hold.
LONG, TIMES = 2**16, 100


@pytest.mark.parametrize("last", [0, 1])
def test_what_a_node_says_last_is_heard(last: int, tmp_path: Path) -> None:
    """Of the node that leads, and of one that does not: the last line of the journal says how the run ended."""
    run = tmp_path / "run"
    with launched(run, 2) as launch:
        until(lambda: len(launch.places()) == 2)
        launch.agents[last].last_words = [f"{number} {'x' * LONG}" for number in range(TIMES)]
        for agent in launch.agents:
            agent.fault = causes.DONE
        until(lambda: all(agent.ended for agent in launch.agents))
        for thread in launch.threads:
            thread.join(20)
    heard = lambda: [line["text"].split()[0] for line in journal.read(run) if line["event"] == "end"]  # noqa: E731
    until(lambda: heard()[-1:] == [str(TIMES - 1)])
    assert heard() == [str(number) for number in range(TIMES)]


def test_a_name_that_does_not_resolve_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a pod, for some seconds after it has started."""
    real, published = socket.getaddrinfo, time.monotonic() + 3.0
    asked: list[bool] = []

    def resolve(host: Any, *arguments: Any, **known: Any) -> Any:
        if str(host).startswith("pod-"):
            asked.append(time.monotonic() < published)
            if asked[-1]:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = "127.0.0.1"
        return real(host, *arguments, **known)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with launched(tmp_path / "run", 2, addresses=("pod-0.set", "pod-1.set")) as launch:
        until(lambda: len(launch.places()) == 2)
        assert any(asked) and not all(asked)
        assert {agent.running.master[0] for agent in launch.agents if agent.running} == {"pod-0.set"}


def test_a_node_listens_at_its_address_or_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listening_address("127.0.0.1") == "127.0.0.1" and listening_address("127.0.0.2") == "127.0.0.2"
    assert listening_address("no-such-host-anywhere.invalid") == ""
    assert listening_address("192.0.2.1") == "", "a name that is still that of another host (RFC 5737)"
    loopback = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **known: loopback)
    assert listening_address("this-host") == "", "others know it by another number"


def test_that_a_node_was_asked_to_end_reaches_the_leader_that_it_joins_later(tmp_path: Path) -> None:
    with launched(tmp_path / "run", 3) as launch:
        until(lambda: len(launch.places()) == 3)
        launch.cut([2])
        until(lambda: not launch.places() and not launch.agents[2].node._member.connected)
        launch.agents[2].asked = True
        time.sleep(0.5)  # it says so, and nobody hears it
        launch.cut([2], is_cut=False)
        until(lambda: all(agent.ended for agent in launch.agents))
        assert [agent.ended.code for agent in launch.agents if agent.ended] == [4, 4, 4]
        assert all(len(agent.met) == 1 for agent in launch.agents), "no attempt was begun with it"
        assert not any(agent.node.alone for agent in launch.agents)


def test_pods_that_come_back_are_waited_for_until_they_can_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(str(tiny(tmp_path)))
    job = prepared(config=str(tiny(tmp_path)), hardware="cpu", nodes=2, ranks=1).job("t", tmp_path, 1)
    made: list[Facts] = []
    monkeypatch.setattr(nodes, "Several", lambda facts, index: made.append(facts))
    for comes_back in (False, True):
        where = Where(0, ("a", "b"), ("127.0.0.1", "127.0.0.2"), f"x-{comes_back}", comes_back)
        nodes.several(config, job, where, where.hosts)
    assert made[0].rejoin_s == REJOIN_S and made[1].rejoin_s >= 300 + PULLING_S
