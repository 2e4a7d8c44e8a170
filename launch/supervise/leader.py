"""What the leading agent of a launch decides for all: which nodes make the next attempt, and what follows after it.

It runs in the event loop of ``member.py`` and only while more than half of the launch's nodes are connected to it.
"""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.supervise import causes
from launch.supervise.causes import Cause, most_telling
from launch.supervise.journal import RankState
from launch.supervise.node import Assembly
from launch.supervise.places import TOO_MANY_FAULTS, Role, assign
from launch.supervise.policy import Decision, Policy
from launch.supervise.records import Records
from launch.supervise.wire import Link
from pretrain.attempt import ExitClass
from pretrain.rundir import LEASE_S

#: Seconds without a word after which a connection counts as lost, and between two words.
LOST_S, BEAT_S = 2.0, 0.4
#: Seconds for all nodes to come to the first attempt before those that are there begin; for nodes that are missing to
#: come back before the launch gives up; and beyond ``launch.grace_s`` for ranks to end once another node's have.
START_S, REJOIN_S, CONCLUDE_S = 60.0, 600.0, 30.0
#: Seconds for nodes of the attempt before to find a new leader, before spares take their places. The old leader, which
#: the others have lost, is not waited for.
SETTLE_S = 1.5
#: Seconds between two writings of ``ranks.json``.
STATES_S = 2.0
#: Kinds of fault that may lie in the node.
HARDWARE = ("node", "device", "signal", "stopped", "hang", "mismatch")


@dataclass(frozen=True)
class Facts:
    """What every node knows of the launch: ``hosts``, ``addresses`` and ``ports`` of all its nodes in one order,
    ``roles`` of each, which of them passed the preflight, and how many ranks each runs. ``launch``: its name, which no
    other launch of the run has. ``rejoin_s``: how long nodes that are missing are waited for."""

    hosts: tuple[str, ...]
    addresses: tuple[str, ...]
    ports: tuple[int, ...]
    roles: Sequence[Role]
    good: frozenset[int]
    ranks: int
    run_dir: Path
    max_restarts: int
    grace_s: float
    token: bytes
    launch: str = "launch"
    rejoin_s: float = REJOIN_S
    listeners: Sequence[Callable[[dict[str, Any]], None]] = ()

    @property
    def majority(self) -> int:
        return len(self.good) // 2 + 1


@dataclass
class Seat:
    """A node that is connected. ``ready``: what it said when it waited for an attempt; None: it does not."""

    link: Link
    heard: float
    ready: Mapping[str, Any] | None = None
    states: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Running:
    """An attempt under way: ``places`` -> nodes; of those that have ended why (None: they were told to) and the highest
    step that they began; and what all were told of. ``confirmed``: nodes that have answered since the last rank ended;
    None while ranks run."""

    attempt: int
    places: dict[int, int]
    ended: dict[int, tuple[Cause | None, int | None]] = field(default_factory=dict)
    noticed: Cause | None = None
    deadline: float | None = None
    confirmed: set[int] | None = None
    state: str = "starting"


class Leader:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.seats: dict[int, Seat] = {}
        self.final: Decision | None = None
        self._last_word: dict[str, Any] = {}
        self._policy = Policy(facts.max_restarts)
        self._places: dict[int, int] = {}
        self._last_attempt = self._judged = 0
        self._faults: dict[int, int] = {}
        self._running: Running | None = None
        self._pending: dict[int, tuple[int, Cause, int | None]] = {}
        self._lost_leaders: set[int] = set()
        self._asked: set[int] = set()
        self._run_id = secrets.token_hex(8)
        self._records = Records(facts.run_dir, facts.listeners)
        self._since = self._idle_since = time.monotonic()
        self._begun = False
        self._said_waiting = False
        self._states_at = 0.0
        self._led_at = self._since
        self._writes = False

    @property
    def leads(self) -> bool:
        return len(self.seats) >= self.facts.majority

    def join(self, index: int, link: Link, message: Mapping[str, Any]) -> None:
        """A node is there, with what it remembers of earlier leaders."""
        self.seats[index] = Seat(link, time.monotonic())
        self._since = time.monotonic()
        self._asked.discard(index)  # one that was asked to end says so again
        if message.get("asked"):
            self._asked.add(index)
        if (told := message.get("memory")) and (not self._begun or int(told["attempt"]) > self._last_attempt):
            self._begun, self._running = False, None  # or another has led since
            self._remember(told)
        if self.final is not None:
            link.send(self._last_word)
        if self._running is not None and self._running.confirmed is not None:
            link.send({"confirm": self._running.attempt})

    def leave(self, index: int, why: str) -> None:
        """A node is no longer there."""
        seat = self.seats.pop(index, None)
        if seat is None:
            return
        seat.link.close()
        running = self._running
        if running is None or index not in running.places.values() or index in running.ended:
            return
        place = next(place for place, node in running.places.items() if node == index)
        host, first = self.facts.hosts[index], place * self.facts.ranks
        text = f"node {host} (ranks {first} to {first + self.facts.ranks - 1}) was lost: {why}"
        lost = causes.fault("node", text, rank=first, host=host)
        running.ended[index] = lost, None
        self._tell("fault", attempt=running.attempt, rank=first, node=host, kind="node", text=text)
        self._notice(lost, index)

    def take(self, index: int, message: Mapping[str, Any]) -> None:
        """What a node said."""
        seat = self.seats[index]
        seat.heard = time.monotonic()
        if (ready := message.get("ready")) is not None:
            seat.ready = ready
            if ready.get("asked"):
                self._asked.add(index)
            if (cause := ready.get("cause")) and not self._begun:  # else this leader has judged it
                self._pending[index] = ready["attempt"], Cause.from_dict(cause), ready["step"]
                if cause["kind"] == "node" and cause["host"] in self.facts.hosts:
                    self._lost_leaders.add(self.facts.hosts.index(cause["host"]))
        elif (told := message.get("told")) is not None:
            self._told(index, told)
        elif (states := message.get("states")) is not None:
            seat.states = states["ranks"]
            if self._running is not None and self._running.noticed is None:
                self._running.state = states["state"]
        elif (found := message.get("found")) is not None:
            self._found(index, found)
        elif (attempt := message.get("confirmed")) is not None:
            running = self._running
            if running is not None and running.attempt == attempt and running.confirmed is not None:
                running.confirmed.add(index)
        elif "asked" in message:
            self._asked.add(index)

    def tick(self) -> None:
        """What is due, twenty times a second."""
        now = time.monotonic()
        for index, seat in list(self.seats.items()):
            if now - seat.heard > LOST_S:
                self.leave(index, f"nothing was heard of it for {now - seat.heard:.1f} s")
        if not self.leads:
            if self.final is None:  # else the others have left, as they should, and some words are still under way
                self._let_go()
            self._give_up_alone(now)
            self._idle_since = now
            return
        self._led_at = now
        self._open_records(now)
        if self._running is not None:
            self._conclude_if_over(now)
        elif self.final is None:
            self._gather(now)
        if now >= self._states_at:
            self._states_at = now + STATES_S
            self._write_states()

    def forgive(self, seconds: float) -> None:
        """This process itself did not run for a while: nobody was silent meanwhile."""
        for seat in self.seats.values():
            seat.heard += seconds

    def close(self) -> None:
        for seat in self.seats.values():
            seat.link.close()
        self._write_states("ended")
        self._records.close()

    def _remember(self, told: Mapping[str, Any]) -> None:
        """The newest of what nodes remember stands: of one attempt what was remembered after it was judged."""
        if (int(told["attempt"]), int(told["judged"])) < (self._last_attempt, self._judged):
            return
        self._last_attempt, self._judged = int(told["attempt"]), int(told["judged"])
        self._policy = Policy.from_dict({**told["policy"], "max_restarts": self.facts.max_restarts})
        self._places = {int(place): int(node) for place, node in told["places"].items()}
        self._faults = {int(node): int(count) for node, count in told["faults"].items()}
        self._run_id = told["run_id"]

    @property
    def _memory(self) -> dict[str, Any]:
        return {
            "attempt": self._last_attempt,
            "judged": self._judged,
            "policy": self._policy.to_dict(),
            "places": self._places,
            "faults": self._faults,
            "run_id": self._run_id,
        }

    def _gather(self, now: float) -> None:
        """Begin the next attempt as soon as the nodes for it are there and ready."""
        if self._last_attempt == 0 and not self._records.is_open:
            return  # perhaps another launch has the run
        late = {index for index, seat in self.seats.items() if seat.ready is None}
        waited_for_ever = now - self._idle_since > self.facts.rejoin_s
        if late and now - self._since < CONCLUDE_S and not waited_for_ever:
            return  # their ranks are about to end
        ready = set(self.seats) - late
        first = not self._places
        if first and ready != self.facts.good and now - self._since < START_S:
            return
        awaited = set(self._places.values()) - ready - self._lost_leaders
        if not first and not self._begun and awaited and now - self._since < SETTLE_S:
            return
        if self._pending and not self._judge_pending():
            return
        chosen = assign(self.facts.roles, ready - self._asked, self._places, self._faults)
        if chosen is None and self._asked:
            names = ", ".join(self.facts.hosts[index] for index in sorted(self._asked)[:8])
            self._finish(Decision(False, causes.PREEMPTED, f"{names} asked to end"))
        elif chosen is not None and (newest := self._records.newest_attempt()) is not None:
            self._begin(chosen, max(newest, self._last_attempt) + 1)
        elif waited_for_ever:
            missing = f"{self._missing()} did not come back" if chosen is None else f"{self.facts.run_dir} was not read"
            text = f"{missing} within {self.facts.rejoin_s:.0f} s"
            self._finish(Decision(False, causes.fault("node" if chosen is None else "store", text), text))
        elif chosen is None and not self._said_waiting:
            self._said_waiting = True
            self._tell("notice", text=f"waiting for nodes: {self._missing()} missing")

    def _give_up_alone(self, now: float) -> None:
        """What is left of a launch waits for the others as long as they are waited for, and no longer."""
        limit = self.facts.rejoin_s
        if self.final is None and now - self._led_at > limit:
            text = f"{len(self.seats)} of {len(self.facts.good)} nodes are connected, for {limit:.0f} s no majority"
            self._finish(Decision(False, causes.fault("node", text), text))

    def _missing(self) -> str:
        names = [self.facts.hosts[index] for index in sorted(self.facts.good - set(self.seats))]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    def _judge_pending(self) -> bool:
        """Decide on an attempt that an earlier leader did not live to judge. True: another follows."""
        found: list[tuple[Cause | None, int | None]] = [
            (cause, step) for attempt, cause, step in self._pending.values() if attempt == self._last_attempt
        ]
        self._pending = {}
        if self._judged >= self._last_attempt:
            return True  # by another leader, of whom these nodes had not heard
        if not found:
            return True
        gone = [node for node in self._places.values() if node not in self.seats]
        for node in gone:
            text = f"node {self.facts.hosts[node]}, which led the launch or was cut off with it, was lost"
            found.append((causes.fault("node", text, host=self.facts.hosts[node]), None))
            self._tell("fault", attempt=self._last_attempt, node=self.facts.hosts[node], kind="node", text=text)
        cut_off = [cause for cause, _ in found if cause is not None and cause.kind == "node"]
        if cut_off and not gone:  # from a leader that ran no rank, which nobody has said yet
            lost = cut_off[0]
            self._tell("fault", attempt=self._last_attempt, node=lost.host, kind="node", text=str(lost))
        return self._judge(self._last_attempt, found).again

    def _begin(self, chosen: dict[int, int], attempt: int) -> None:
        facts = self.facts
        self._last_attempt, self._places, self._begun, self._said_waiting = attempt, chosen, True, False
        self._running = Running(attempt, chosen)
        self._lost_leaders.clear()
        leading = self.seats[chosen[0]].ready
        assert leading is not None
        for place, index in chosen.items():
            seat = self.seats[index]
            seat.ready, seat.states = None, []
            met = Assembly(
                attempt, self._policy.restarts, place, len(chosen), place * facts.ranks, len(chosen) * facts.ranks,
                (facts.addresses[chosen[0]], leading["port"]), self._run_id,
            )  # fmt: skip
            seat.link.send({"assembly": asdict(met)})
        for seat in self.seats.values():
            seat.link.send({"memory": self._memory})
        names = ", ".join(facts.hosts[chosen[place]] for place in sorted(chosen)[:8])
        more = f" and {len(chosen) - 8} more" if len(chosen) > 8 else ""
        self._tell("notice", attempt=attempt, node=platform.node(), text=f"attempt {attempt} runs on {names}{more}")

    def _told(self, index: int, told: Mapping[str, Any]) -> None:
        self._tell(told["event"], **told["fields"])
        running, known = self._running, told["fields"]
        if told["event"] == "fault" and running is not None and known.get("attempt") == running.attempt:
            cause = causes.fault(known["kind"], known["text"], rank=known["rank"], host=known["node"])
            self._notice(cause, index)

    def _found(self, index: int, found: Mapping[str, Any]) -> None:
        running = self._running
        if running is None or found["attempt"] != running.attempt:
            return
        cause = None if found["cause"] is None else Cause.from_dict(found["cause"])
        running.ended[index] = cause, found["step"]
        if cause is None:
            return
        if cause.exit_class is ExitClass.FAULT:
            self._notice(cause, index)
        elif running.deadline is None:
            running.deadline = time.monotonic() + self.facts.grace_s + CONCLUDE_S

    def _notice(self, cause: Cause, source: int) -> None:
        """Every other node of the attempt ends its ranks."""
        running = self._running
        if running is None or running.noticed is not None:
            return
        running.noticed, running.state = cause, "restarting"
        running.deadline = time.monotonic() + CONCLUDE_S
        for node in running.places.values():
            if node != source and node in self.seats and node not in running.ended:
                self.seats[node].link.send({"notice": cause.to_dict(), "attempt": running.attempt})

    def _conclude_if_over(self, now: float) -> None:
        running = self._running
        assert running is not None
        open_nodes = [node for node in running.places.values() if node not in running.ended]
        if open_nodes and running.deadline is not None and now > running.deadline:
            for node in open_nodes:
                why = "its ranks did not end with the others'"
                if running.noticed is not None:  # whose fault it is was said before
                    running.ended[node] = None, None
                    text = f"node {self.facts.hosts[node]} is left out: {why}"
                    self._tell("notice", attempt=running.attempt, node=self.facts.hosts[node], text=text)
                self.leave(node, why)
            open_nodes = []
        if open_nodes or not self._confirmed(running):
            return
        self._running = None
        self._since = self._idle_since = now
        self._judge(running.attempt, [*running.ended.values(), (running.noticed, None)])

    def _confirmed(self, running: Running) -> bool:
        """Whether more than half of the nodes have heard this one since the attempt ended. One that nobody hears any
        more loses the others one after the other, and must not blame the first."""
        if running.confirmed is None:
            running.confirmed = set()
            for seat in self.seats.values():
                seat.link.send({"confirm": running.attempt})
        return len(running.confirmed & set(self.seats)) >= self.facts.majority

    def _judge(self, attempt: int, found: Iterable[tuple[Cause | None, int | None]]) -> Decision:
        found, self._judged = list(found), attempt
        steps = [step for _, step in found if step is not None]
        cause = most_telling(cause for cause, _ in found if cause is not None)
        if cause.kind in HARDWARE and (node := self._node_of(cause)) is not None:
            self._faults[node] = self._faults.get(node, 0) + 1
            spared = len(self.facts.good) > len(self._places)
            if spared and cause.kind == "device":  # said by the device itself: once is enough
                self._faults[node] = max(self._faults[node], TOO_MANY_FAULTS)
            elif spared and cause.fingerprint is not None:
                # It may be the node, and there is another: the same failure on that one is the program's own.
                self._faults[node] = TOO_MANY_FAULTS
                cause = replace(cause, fingerprint=f"{cause.fingerprint}, {self.facts.hosts[node]}")
        decision = self._policy.decide(cause, max(steps, default=None))
        self._records.record(attempt, cause)
        if not decision.again:
            self._finish(decision)
        else:
            for seat in self.seats.values():
                seat.link.send({"decision": {**decision.to_dict(), "attempt": attempt}, "memory": self._memory})
        return decision

    def _node_of(self, cause: Cause) -> int | None:
        """The node that a cause blames: by its host, else by the place of its rank."""
        if cause.host in self.facts.hosts:
            return self.facts.hosts.index(cause.host)
        return None if cause.rank is None else self._places.get(cause.rank // self.facts.ranks)

    def _finish(self, decision: Decision) -> None:
        """``alone``: a part of the launch that gives up says nothing for the rest."""
        self.final = decision
        self._last_word = {"decision": {**decision.to_dict(), "alone": not self.leads}}
        if self.leads:
            self._records.ended(self.facts.launch, decision.code)
        for seat in self.seats.values():
            seat.link.send(self._last_word)

    def _write_states(self, state: str | None = None) -> None:
        ranks = [RankState(**rank) for seat in self.seats.values() for rank in seat.states]
        now = state or (self._running.state if self._running else "restarting")
        self._records.ranks(self._last_attempt, now, sorted(ranks, key=lambda rank: rank.rank))

    def _tell(self, event: str, **fields: Any) -> None:
        self._records.write(event, **fields)

    def _let_go(self) -> None:
        """The journal is for the one that leads."""
        if self._writes:
            self._writes = False
            self._records.release()

    def _open_records(self, now: float) -> None:
        """Where another launch supervises the run nothing is started; that an earlier leader's lock ends is awaited."""
        if self.final is not None:
            return
        self._writes = True
        self._records.open()
        refusal = self._records.refusal
        if refusal is not None and self._last_attempt == 0 and now - self._since > LEASE_S:
            self._finish(Decision(False, Cause(ExitClass.REFUSED, "refused", refusal), refusal))
