"""Faults of nodes and of the network between them: a rank on each of two nodes, and spare nodes that wait."""

from __future__ import annotations

import time

from pretrain.rundir import attempts
from tests.faults.bench import STEPS, Bench, Outcome
from tests.faults.runs import STRIKING_S, Launch, Strike

#: Seconds in which the smaller part of a cut launch must have ended its ranks.
PARTED_S = 5.0


def node_killed(bench: Bench, index: int, unplug: bool = False, steps: int = STEPS) -> Outcome:
    """The spare takes its place. Node 0 leads the launch and hosts the store of the ranks."""
    with bench.launch(f"node-{index}", steps=steps) as launch:
        launch.kill_node(index, unplug)
        return bench.judge(launch, launch.finish())


def rank_killed(bench: Bench) -> Outcome:
    """A rank dies and its node lives: all start again where they were. The nodes pass a real preflight first."""
    with bench.launch("rank", preflight=True) as launch:
        launch.kill_at(1, "compute")
        outcome = bench.judge(launch, launch.finish())
        return outcome


def cut_off(bench: Bench, index: int, one_way: bool = False) -> Outcome:
    """One of three nodes is cut off: the two others go on with the spare; it ends its rank, and is a spare when it is
    back. ``one_way``: it still hears the others."""
    with bench.launch(f"cut-{index}") as launch:
        network = launch.network
        assert network is not None
        others = [other for other in range(3) if other != index]
        attempt = launch.wait_until_warm()
        launch.remember()
        pid = launch.pid(launch.places()[index])
        launch.pace(STRIKING_S)
        how = "one way" if one_way else "both ways"
        strike = Strike(f"partition, {how}", ("node",), None, attempt, time.time(), network.names[index])
        if one_way:
            for other in others:
                network.swallow(index, other)
        else:
            network.pull(index)
        launch.strikes.append(strike)
        parted = ended_within(launch, pid)
        launch.wait(lambda: len(launch.journal("training")) >= 2, "training without the node that is cut off")
        for other in others if one_way else ():
            network.swallow(index, other, on=False)
        if not one_way:
            network.plug_in(index)
        outcome = bench.judge(launch, launch.finish(), f"its rank was ended after {parted:.1f} s")
        return _one_side_only(launch, outcome, parted, expected=2)


def flaps(bench: Bench, times: int = 3) -> Outcome:
    """A cable is out for five seconds and in for five, again and again: one attempt at a time, and it ends well."""
    with bench.launch("flap") as launch:
        network = launch.network
        assert network is not None
        launch.wait_until_warm()
        launch.remember()
        for _ in range(times):
            network.pull(1)
            time.sleep(5)
            network.plug_in(1)
            time.sleep(5)
        launch.pace(0.0)
        code = launch.ended()
        outcome = bench.judge(launch, code, f"{len(attempts(launch.root))} attempts in {times} flaps")
        return _one_side_only(launch, outcome, 0.0)


def narrow(bench: Bench) -> Outcome:
    """1 Mbit/s between the nodes: slower, and no fault."""
    with bench.launch("narrow") as launch:
        network = launch.network
        assert network is not None
        launch.wait_until_warm()
        network.throttle(1, "1mbit")
        launch.pace(STRIKING_S)
        time.sleep(10)
        launch.pace(0.0)
        outcome = bench.judge(launch, launch.ended(), f"{len(launch.lines())} steps")
        if attempts(launch.root) != [1]:
            outcome.oracles["O4"].append(f"a slow network led to attempts {attempts(launch.root)}")
        return outcome


def ended_within(launch: Launch, pid: int) -> float:
    """Seconds until a process is gone."""
    began = time.monotonic()
    launch.wait(lambda: all(process.pid != pid for process in launch.family()), "the end of a rank that is cut off")
    return time.monotonic() - began


def _one_side_only(launch: Launch, outcome: Outcome, parted_s: float, expected: int | None = None) -> Outcome:
    """No two parts of the launch went on: attempts follow each other, and each line of metrics is of one of them."""
    wrong = outcome.oracles["O3"]
    if parted_s > PARTED_S:
        wrong.append(f"the smaller part went on for {parted_s:.1f} s")
    begun = [line["attempt"] for line in launch.journal("start")]
    if begun != sorted(set(begun)):
        wrong.append(f"attempts were begun twice: {begun}")
    if expected is not None and len(attempts(launch.root)) != expected:
        wrong.append(f"{len(attempts(launch.root))} attempts, and {expected} were needed")
    order = [line["attempt"] for line in launch.lines()]
    if order != sorted(order):
        wrong.append("an earlier attempt wrote metrics after a later one had begun")
    return outcome
