"""What strikes a soak: faults of a rank, of the program that supervises it, of a node and of its cable.

All of them are what a run must survive to the last bit. After a fault the run trains on by itself, or once what was
broken is put right again, as a scheduler or a person would.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pretrain.guards import findings
from tests.faults import clock, memory, oracles
from tests.faults.runs import Launch, Run, Strike

#: Seconds until a scheduler starts a node's program again, at the longest; and that a rank's clock jumps.
BACK_S, JUMP_S = 5.0, 7200.0
#: Steps from now at which something happens in a rank: it must know by then.
AHEAD = 6


@dataclass(frozen=True)
class Struck:
    """``ends``: the attempt is over. ``back``: puts right what is broken; ``late``: once training goes on."""

    ends: bool = True
    back: Callable[[], None] | None = None
    late: bool = False


@dataclass(frozen=True)
class Fault:
    """``play`` does it to a run that trains. ``missing``: why this machine cannot; None where it can."""

    name: str
    play: Callable[[Run, random.Random], Struck]
    missing: Callable[[], str | None] = lambda: None


def sent(name: str, number: signal.Signals, kind: str) -> Fault:
    """A signal to a rank."""

    def play(run: Run, chance: random.Random) -> Struck:
        rank = chance.randrange(run.ranks)
        run.strikes.append(Strike(name, (kind,), rank, run.attempt, time.time()))
        run.signal(rank, number)
        return Struck()

    return Fault(name, play)


def inside(
    name: str, what: str, phase: str, kind: str | None, missing: Callable[[], str | None] = lambda: None
) -> Fault:
    """Something in a rank, at a step that comes soon. ``kind`` None: the run goes on as if nothing had been."""

    def play(run: Run, chance: random.Random) -> Struck:
        rank, attempt = chance.randrange(run.ranks), run.attempt
        step = run.next_step(phase, ahead=AHEAD)
        at = run.wait_for_strike(run.arm(rank, phase, what, step, seconds=chance.choice((-JUMP_S, JUMP_S))))
        if what == "nan":
            run.wait(lambda: (step, rank) in _findings(run), f"a finding about step {step} of rank {rank}")
        if kind is not None:  # of two replicas that differ nothing says which is right
            run.strikes.append(Strike(name, (kind,), None if kind == "mismatch" else rank, attempt, at))
        return Struck(ends=kind is not None)

    return Fault(name, play, missing)


def _findings(run: Run) -> list[tuple[int, int | None]]:
    return [(found["step"], found["rank"]) for found in findings.read(run.root)]


def preempted(run: Run, chance: random.Random) -> Struck:
    run.ask_to_end()
    code = run.ended()
    assert code == 4, f"asked to end, it ended with code {code}:\n{run.output()}"
    return _once_more(run)


def supervisor_killed(run: Run, chance: random.Random) -> Struck:
    """On one node: nobody is left to start its ranks again, and the same command is given."""
    run.processes[-1].kill()
    run.ended()
    return _once_more(run)


def _once_more(run: Run) -> Struck:
    left = oracles.o5_nothing_left(run)
    assert not left, left
    run.start()
    return Struck()


def node_down(name: str, role: str, power: bool = False, alone: bool = False) -> Fault:
    """All processes of a node are killed, and its program is started again; ``power``: nobody is told of it; ``alone``:
    only the program, with which its ranks end."""

    def play(run: Run, chance: random.Random) -> Struck:
        assert isinstance(run, Launch) and run.network is not None
        index, ends = _node(run, chance, role)
        doomed = run.on_node(index)
        _strike(run, name, index, ends)
        if power:
            run.network.pull(index)
        if alone:
            run.programs[index].kill()
        else:
            for process in doomed:
                process.kill()

        def back() -> None:
            run.programs[index].wait()
            time.sleep(chance.uniform(0.0, BACK_S))
            if power:
                run.network.plug_in(index)  # type: ignore[union-attr]
            run.start_node(index)

        return Struck(ends, back)

    return Fault(name, play)


def cut(name: str, role: str, one_way: bool = False) -> Fault:
    """A node's cable is out until the others train again; ``one_way``: it hears them all the time."""

    def play(run: Run, chance: random.Random) -> Struck:
        assert isinstance(run, Launch) and run.network is not None
        network = run.network
        index, ends = _node(run, chance, role)
        others = [other for other in range(len(network.boxes)) if other != index]
        _strike(run, name, index, ends)
        if one_way:
            for other in others:
                network.swallow(index, other)
        else:
            network.pull(index)

        def back() -> None:
            if one_way:
                for other in others:
                    network.swallow(index, other, on=False)
            else:
                network.plug_in(index)

        return Struck(ends, back, late=True)

    return Fault(name, play)


def _node(run: Launch, chance: random.Random, role: str) -> tuple[int, bool]:
    """A node that trains, leads, or is a spare and does not lead where there is one; whether losing it ends the
    attempt."""
    run.wait(lambda: run.leading() is not None, "a node that leads")
    leading, training = run.leading(), set(run.places())
    nodes = set(run.programs)
    wanted = {"trains": training - {leading}, "leads": {leading}, "waits": nodes - training - {leading}}[role]
    index = chance.choice(sorted(node for node in wanted or nodes - training if node is not None))
    return index, index in training or index == leading


def _strike(run: Launch, name: str, index: int, ends: bool) -> None:
    assert run.network is not None
    if ends:
        run.strikes.append(Strike(name, ("node",), None, run.attempt, time.time(), run.network.names[index]))


def while_recovering(run: Run, chance: random.Random, before: int) -> None:
    """A rank of the attempt that follows is killed as soon as it is there."""
    rank = chance.randrange(run.ranks)
    run.wait(lambda: run.begun(rank) > before, "the next attempt")
    attempt, at = run.begun(rank), time.time()
    with suppress(ProcessLookupError):  # that attempt has ended for the same reason as the one before
        run.signal(rank, signal.SIGKILL)
        run.strikes.append(Strike(RECOVERING, ("signal",), rank, attempt, at))


RECOVERING, NO_MEMORY = "a rank is killed while it recovers", "the kernel kills for memory"
ANYWHERE: Sequence[Fault] = (
    sent("kill -9 of a rank", signal.SIGKILL, "signal"),
    sent("a rank is stopped", signal.SIGSTOP, "stopped"),
    inside("an exception", "exception", "compute", "exception"),
    inside("a segmentation fault", "segmentation fault", "compute", "signal"),
    inside("the interpreter is locked", "interpreter locked", "compute", "hang"),
    inside("the data loader sleeps", "asleep", "read", "hang"),
    inside("a save sleeps", "asleep", "save", "hang"),
    inside("NaN, once", "nan", "numbers", None),
    inside("a bit of a weight flips", "flip", "numbers", "mismatch"),
    inside("a clock jumps by two hours", "clock", "compute", None, clock.missing),
    Fault("preempted, and the same again", preempted),
)
ONE_NODE: Sequence[Fault] = (
    *ANYWHERE,
    inside(NO_MEMORY, "eat memory", "compute", "oom", memory.missing),
    Fault("kill -9 of the supervisor", supervisor_killed),
)
SEVERAL: Sequence[Fault] = (
    *ANYWHERE,
    node_down("a node is killed", "trains"),
    node_down("the leading node is killed", "leads"),
    node_down("a spare node is killed", "waits"),
    node_down("kill -9 of a node's supervisor", "trains", alone=True),
    node_down("a node loses power", "trains", power=True),
    cut("a node is cut off", "trains"),
    cut("the leading node is cut off", "leads"),
    cut("a node is heard by nobody", "trains", one_way=True),
)
