"""Nodes that meet on a path: one verdict for all of them, whatever is missing, late, wrong or started again."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.preflight import shared
from launch.preflight.facts import Facts
from launch.preflight.report import Verdict
from launch.preflight.shared import FOLDER, Launch, exchange
from pretrain.rundir import _entries
from stoker.errors import Refusal
from tests.launch.preflight.test_compare import fact
from tests.launch.preflight.turns import Program, Turns

Outcome = tuple[Verdict, str | None] | Refusal
#: Looks at files after which a node program is killed, to be started again.
LIVES = st.lists(st.integers(0, 40), max_size=2)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same protocol at ten times the pace: nothing in it depends on how long a look takes."""
    monkeypatch.setattr(shared, "LOOK_S", 0.02)


def launch(node: str, nodes: str, needed: int, timeout_s: float = 30.0) -> Launch:
    return Launch("job-1", node, tuple(nodes), needed, timeout_s=timeout_s, quiet_s=1.0)


def meet(
    path: Path | Callable[[str], Path],
    nodes: str,
    needed: int,
    present: str | None = None,
    facts: Callable[[str], Facts] = fact,
    ahead_s: dict[str, float] | None = None,
    late_s: dict[str, float] | None = None,
    timeout_s: float = 30.0,
) -> dict[str, Outcome]:
    """Each node a thread; what each one came to."""
    found: dict[str, Outcome] = {}

    def node(name: str) -> None:
        time.sleep((late_s or {}).get(name, 0.0))
        wall = lambda: time.time() + (ahead_s or {}).get(name, 0.0)  # noqa: E731
        where = path if isinstance(path, Path) else path(name)
        try:
            found[name] = exchange(launch(name, nodes, needed, timeout_s), facts(name), where, wall)
        except Refusal as refusal:
            found[name] = refusal

    threads = [threading.Thread(target=node, args=(name,)) for name in (present or nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(found) == set(present or nodes), "a node hangs"
    return found


def agreed(found: dict[str, Outcome]) -> Verdict:
    """The one verdict of all, each of which acts by it."""
    verdicts = [one[0] for one in found.values() if not isinstance(one, Refusal)]
    assert len(verdicts) == len(found) and all(verdict == verdicts[0] for verdict in verdicts), found
    (verdict, *_) = verdicts
    aside = {} if verdict.trouble else verdict.excluded
    assert {node: one[1] for node, one in found.items() if not isinstance(one, Refusal)} == {
        node: aside.get(node) for node in found
    }
    return verdict


def test_nodes_that_start_at_different_times_come_to_one_verdict(tmp_path: Path) -> None:
    verdict = agreed(meet(tmp_path, "abcd", 3, late_s={"a": 0.5, "c": 1.0}))
    assert verdict.good == tuple("abcd") and not verdict.excluded and verdict.trouble is None


def test_one_node_alone_is_enough_for_itself(tmp_path: Path) -> None:
    assert agreed(meet(tmp_path, "a", 1)).good == ("a",)


def test_the_run_directory_can_still_begin(tmp_path: Path) -> None:
    """`inspect` refuses a directory that holds other files before it is a run's."""
    meet(tmp_path / "run", "ab", 2)
    assert _entries(tmp_path / "run") == []


def test_a_node_that_is_down_is_excluded_and_a_spare_is_used(tmp_path: Path) -> None:
    verdict = agreed(meet(tmp_path, "abcd", 3, present="abd", timeout_s=1.0))
    assert verdict.good == tuple("abd") and verdict.trouble is None
    assert verdict.excluded["c"].startswith(f"did not answer in {tmp_path / FOLDER / 'job-1'} within 1 s")


@pytest.mark.parametrize("down", ["a", "ab"])
def test_without_the_leader_the_next_node_judges_for_all(down: str, tmp_path: Path) -> None:
    present = "".join(node for node in "abcde" if node not in down)
    verdict = agreed(meet(tmp_path, "abcde", 3, present=present, timeout_s=1.0))
    assert verdict.good == tuple(present) and set(verdict.excluded) == set(down)


def test_a_leader_that_dies_while_it_waits_is_excluded(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / "job-1"
    folder.mkdir(parents=True)
    leader = shared._Meeting(launch("a", "abcd", 3), fact("a"), folder, time.time)
    stop = time.monotonic() + 1.0

    def dying() -> None:
        while time.monotonic() < stop:
            leader._write()
            time.sleep(0.02)

    thread = threading.Thread(target=dying)
    thread.start()
    verdict = agreed(meet(tmp_path, "abcd", 3, present="bcd"))
    thread.join()
    assert verdict.good == tuple("bcd") and set(verdict.excluded) == {"a"}


def test_a_leader_that_is_late_is_waited_for_once_it_was_heard(tmp_path: Path) -> None:
    """Alone, the second node would have judged at 2.5 s; the leader comes at 1 s, and the last node at 3 s."""
    verdict = agreed(meet(tmp_path, "abc", 3, late_s={"a": 1.0, "c": 3.0}, timeout_s=2.5))
    assert verdict.good == tuple("abc")


def test_paths_that_are_not_shared_train_nowhere(tmp_path: Path) -> None:
    """Two of three nodes are a majority and go on; the third finds itself alone, and so do two nodes apart."""
    found = meet(lambda node: tmp_path / ("island" if node == "c" else "shared"), "abc", 2, timeout_s=1.0)
    alone = agreed({"c": found.pop("c")})
    both = agreed(found)
    assert both.good == ("a", "b") and both.trouble is None and "run.dir" in both.excluded["c"]
    assert alone.good == ("c",) and alone.trouble is not None
    apart = meet(lambda node: tmp_path / f"apart-{node}", "ab", 1, timeout_s=1.0)
    assert all("no majority" in str(agreed({node: one}).trouble) for node, one in apart.items())


def test_a_clock_that_is_an_hour_off_is_excluded_and_one_within_a_second_is_not(tmp_path: Path) -> None:
    verdict = agreed(meet(tmp_path, "abcd", 3, ahead_s={"b": 3600.0, "c": 0.3, "d": -0.3}))
    assert set(verdict.excluded) == {"b"} and "ahead of the leader's" in verdict.excluded["b"]
    said = float(verdict.excluded["b"].split("at least ")[1].split(" s")[0])
    assert 3590 < said <= 3600.1, "and the bound is true"
    behind = agreed(meet(tmp_path / "2", "abc", 2, ahead_s={"c": -3600.0}))
    assert "behind the leader's" in behind.excluded["c"]


def test_when_the_leaders_clock_is_the_wrong_one_too_few_are_left(tmp_path: Path) -> None:
    """Whose clock is right cannot be known: the launch is refused, and the reason says by how much they differ."""
    verdict = agreed(meet(tmp_path, "abc", 3, ahead_s={"a": -7200.0}))
    assert verdict.good == ("a",) and "ahead of the leader's" in str(verdict.trouble)


def test_a_node_whose_own_checks_refuse_is_told_to_all(tmp_path: Path) -> None:
    def facts(node: str) -> Facts:
        return replace(fact(node), refused="open files: 128 a process") if node == "b" else fact(node)

    assert agreed(meet(tmp_path, "abc", 2, facts=facts)).excluded == {"b": "open files: 128 a process"}


def test_a_node_that_comes_when_all_is_decided_learns_that_it_is_out(tmp_path: Path) -> None:
    verdict = agreed(meet(tmp_path, "abc", 2, present="ab", timeout_s=1.0))
    assert agreed(meet(tmp_path, "abc", 2, present="c", timeout_s=1.0)) == verdict and set(verdict.excluded) == {"c"}
    assert [shared.goes_on("job-1", tmp_path, node) for node in (None, *"abc")] == [True, True, True, False]


@pytest.mark.parametrize("node", ["a", "c"])
def test_a_node_that_is_started_again_takes_its_part_at_once(node: str, tmp_path: Path) -> None:
    verdict = agreed(meet(tmp_path, "abc", 3))
    began = time.monotonic()
    assert agreed(meet(tmp_path, "abc", 3, present=node, timeout_s=600.0)) == verdict
    assert time.monotonic() - began < 60, "it waits for nobody: the others have met"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hashes": {"code": "new"}}, "code new where 1 of 2"),
        ({"versions": {"torch": "9.9"}}, "torch 9.9"),
        ({"refused": "12 bit errors"}, "12 bit errors"),
    ],
)
def test_a_node_that_comes_back_another_one_takes_no_part(
    changed: dict[str, object], says: str, tmp_path: Path
) -> None:
    verdict = agreed(meet(tmp_path, "abc", 3))
    another = replace(fact("a"), **changed)  # type: ignore[arg-type]
    found, aside = exchange(launch("a", "abc", 3), another, tmp_path)
    assert found == verdict and aside is not None and says in aside
    assert exchange(launch("a", "abc", 3), fact("a"), tmp_path) == (verdict, None), "and the verdict stands"


def test_a_verdict_of_another_release_is_no_reason_to_end_the_others(tmp_path: Path) -> None:
    agreed(meet(tmp_path, "ab", 2))
    path = tmp_path / FOLDER / "job-1" / shared.VERDICT
    assert shared.goes_on("job-1", tmp_path) and not shared.goes_on("job-2", tmp_path)
    for content in ("{", "[]", json.dumps({"format": {"name": shared.VERDICT_FORMAT, "version": 99}})):
        path.write_text(content)
        aside = exchange(launch("b", "ab", 2), fact("b"), tmp_path)[1]
        assert aside is not None and "another release" in aside


def test_a_leader_that_is_started_again_while_all_wait_hears_them_anew(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / "job-1"
    folder.mkdir(parents=True)
    first = shared._Meeting(launch("a", "abc", 3), fact("a"), folder, time.time)
    met = threading.Event()

    def dying() -> None:
        while not (first._gather() or len(first.offsets) > 0):
            first._write()
            time.sleep(0.02)
        met.set()

    found: dict[str, Outcome] = {}
    others = threading.Thread(target=lambda: found.update(meet(tmp_path, "abc", 3, present="bc", late_s={"c": 1.0})))
    thread = threading.Thread(target=dying)
    for one in (thread, others):
        one.start()
    assert met.wait(30)
    found |= meet(tmp_path, "abc", 3, present="a")
    others.join(60)
    assert agreed(found).good == tuple("abc")


@given(seed=st.integers(0, 2**32), needed=st.integers(1, 5), lives=st.lists(LIVES, min_size=1, max_size=5))
@settings(max_examples=60)
def test_however_nodes_stall_die_and_come_back_there_is_one_verdict(
    seed: int, needed: int, lives: list[list[int]]
) -> None:
    """Among them the first node that stalls for longer than the others wait for it, at each of its looks at a file."""
    nodes = "abcde"[: len(lives)]
    needed = min(needed, len(nodes))
    turns = Turns(seed)
    with tempfile.TemporaryDirectory() as folder, turns.of_shared():
        programs: dict[str, Program] = {}
        for node, dies in zip(nodes, lives, strict=True):
            meeting = replace(launch(node, nodes, needed, timeout_s=20.0), quiet_s=10.0)
            body = partial(exchange, meeting, fact(node), Path(folder), lambda: turns.now)
            programs[node] = turns.start(body, [*dies, None])
        turns.finish()
    outcomes = [{node: outcome} for node, program in programs.items() for outcome in program.outcomes]
    assert len(outcomes) >= len(nodes) and turns.links == 1
    assert all(agreed(outcome) == agreed(outcomes[0]) for outcome in outcomes)


def test_what_cannot_be_read_excludes_the_node_that_wrote_it(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / "job-1"
    folder.mkdir(parents=True)
    (folder / "c.json").write_text(json.dumps({"format": {"name": "preflight-node", "version": 99}}))
    verdict = agreed(meet(tmp_path, "abc", 2, present="ab", timeout_s=5.0))
    assert "another release" in verdict.excluded["c"]


def test_what_is_torn_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / "job-1"
    folder.mkdir(parents=True)
    (folder / "c.json").write_text('{"torn')
    assert "did not answer" in agreed(meet(tmp_path, "abc", 2, present="ab", timeout_s=1.0)).excluded["c"]


def test_old_launches_are_cleared_away(tmp_path: Path) -> None:
    for number in range(20):
        agreed({"a": exchange(replace(launch("a", "a", 1), id=f"job-{number}"), fact("a"), tmp_path)})
    kept = {path.name for path in (tmp_path / FOLDER).iterdir()}
    assert len(kept) == shared.KEPT and "job-19" in kept


def test_a_path_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"a: .*file/\.preflight/job-1 cannot be used: Not a directory"):
        exchange(launch("a", "a", 1), fact("a"), tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"id": "../x"}, "cannot name a launch"),
        ({"nodes": ("a", "b\n#SBATCH")}, "cannot name a launch or a node"),
        ({"nodes": ("a", "b", "b")}, "node b is listed twice"),
        ({"node": "z"}, "this node, z, is not one of a, b"),
        ({"needed": 3}, "3 nodes are to train, of 2"),
        ({"needed": 0}, "0 nodes are to train"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(given: dict[str, object], says: str) -> None:
    fields = {"id": "job-1", "node": "a", "nodes": ("a", "b"), "needed": 2} | given
    with pytest.raises(Refusal, match=says):
        Launch(**fields)  # type: ignore[arg-type]
