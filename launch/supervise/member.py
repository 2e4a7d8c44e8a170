"""A node among those of its launch: finds the node that leads, or leads, and keeps the connection to it.

Every node knows all others in one order. One that is connected to none asks those at the head of the order who leads,
and joins that one; where nobody does, it joins the first that can be reached, and that is itself if none before it can.
Who leads is so only while more than half of the nodes are connected to it, and each is connected to one: so of a launch
that is cut in two, at most one part goes on. A node that loses the connection ends its ranks before it joins another.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from launch.supervise.leader import BEAT_S, LOST_S, Facts, Leader
from launch.supervise.wire import Broken, Door, Link, connect
from stoker.errors import Refusal

#: Nodes at the head of the order that may lead.
CANDIDATES = 8
#: Seconds for an answer, between two rounds of asking, and between two looks for a better leader.
ASK_S, ROUND_S, LOOK_S = 1.0, 0.2, 2.0
#: Seconds between two turns of the leader; the process did not run where it took this much longer.
TICK_S, STARVED_S = 0.05, 0.25
#: Seconds for the last decision to reach the others, and for the last words of a node to reach the leader.
FAREWELL_S, LAST_WORDS_S = 3.0, 2.0


class Member:
    """Runs in a thread of its own. ``changed`` is held while the fields below it are read or written.

    ``assembly``, ``decision``, ``notice``: the newest that the leader said; ``connected``: to a leader; ``losses``:
    connections that were lost so far.
    """

    def __init__(self, facts: Facts, index: int) -> None:
        self.changed = threading.Condition()
        self.assembly: dict[str, Any] | None = None
        self.decision: dict[str, Any] | None = None
        self.notice: dict[str, Any] | None = None
        self.connected = False
        self.losses = 0
        self.leader_host = self.lost_host = ""
        self._facts, self._index = facts, index
        self._ready: Mapping[str, Any] | None = None
        self._memory: Mapping[str, Any] | None = None
        self._link: Link | None = None
        self._leader: Leader | None = None
        self._door = Door(facts.token, self._visited)
        self._error: BaseException | None = None
        self._asked = self._closing = False
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name="stoker-member", daemon=True)
        self._thread.start()

    def say(self, message: Mapping[str, Any]) -> None:
        """Tell the leader, if there is one."""
        self._call(self._send, message)

    def wait_for_attempt(self, ready: Mapping[str, Any]) -> None:
        """This node waits for an attempt, as ``ready`` says: told to every leader that it joins until one follows."""
        with self.changed:
            self.assembly = self.notice = None

        def change() -> None:
            self._ready = ready
            self._send({"ready": ready})

        self._call(change)

    def ask_to_end(self) -> None:
        """This node was asked to end: told to the leader, and to every one that it joins from now on."""

        def change() -> None:
            self._asked = True
            self._send({"asked": self._index})

        self._call(change)

    def check(self) -> None:
        """Raise what has ended the thread."""
        if self._error is not None:
            raise self._error

    @property
    def heads(self) -> bool:
        """Whether this node leads, or would if enough others joined it."""
        return self._leader is not None

    def close(self) -> None:
        """Leave the launch; what was said before reaches the leader, unless that takes too long. A leader first waits,
        a few seconds at most, until the others have heard the decision."""

        def end() -> None:
            self._closing = True

        self._call(end)  # after all that was said
        self._thread.join(LAST_WORDS_S + FAREWELL_S + 2)

    def _call(self, function: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._link is not None:
            self._link.send(message)

    def _run(self) -> None:
        try:
            with self._runner:
                self._runner.run(self._main())
        except BaseException as error:
            self._error = error
        finally:
            with self.changed:
                self.connected = False
                self.changed.notify_all()

    async def _main(self) -> None:
        facts = self._facts
        if self._index in self._candidates:
            address, port = facts.addresses[self._index], facts.ports[self._index]
            try:
                await self._door.open(listening_address(address), port)
            except OSError as error:
                raise Refusal(
                    f"{facts.hosts[self._index]} cannot listen at {address}:{port}, where agents meet: {error.strerror}"
                ) from None
        turns = asyncio.ensure_future(self._turns())
        turns.add_done_callback(self._turns_ended)
        try:
            while not self._closing:
                if (leader := await self._find()) is None:
                    await asyncio.sleep(ROUND_S)
                    continue
                await self._follow(leader)
        finally:
            turns.cancel()
            if self._leader is not None:
                await self._part(self._leader)
            self._door.close()

    def _turns_ended(self, turns: asyncio.Future[None]) -> None:
        if not turns.cancelled():
            self._error, self._closing = turns.exception(), True

    @property
    def _candidates(self) -> list[int]:
        return sorted(self._facts.good)[:CANDIDATES]

    async def _find(self) -> int | None:
        """The node to join; None where it is not known yet. Begins to head where no node before this one answers."""
        if self._leader is not None and self._leader.leads:
            return self._index
        others = [index for index in self._candidates if index != self._index]
        answers = [answer for answer in await asyncio.gather(*map(self._ask, others)) if answer is not None]
        if (leading := next((a["index"] for a in answers if a["leads"]), None)) is not None:
            self._step_down()
            return int(leading)
        before = sorted(a["index"] for a in answers if a["index"] < self._index)
        if before or self._index not in self._candidates:
            self._step_down()
            heading = [a["index"] for a in answers if a["heads"]]
            return int(min(heading)) if heading else None
        if self._leader is None:
            self._leader = Leader(self._facts)
        return self._index

    async def _ask(self, index: int) -> dict[str, Any] | None:
        """What another node says of itself; None where it cannot be reached."""
        try:
            link = await connect(
                self._facts.addresses[index], self._facts.ports[index], self._facts.token, timeout_s=ASK_S
            )
        except Broken:
            return None
        try:
            link.send({"ask": self._index})
            async with asyncio.timeout(ASK_S):
                return await link.receive()
        except (Broken, TimeoutError):
            return None
        finally:
            link.close()

    def _step_down(self) -> None:
        if self._leader is not None:
            self._leader.close()
            self._leader = None

    async def _follow(self, leader: int) -> None:
        """Join a node and listen to it until the connection ends, or a better one is there."""
        facts = self._facts
        try:
            link = await connect(facts.addresses[leader], facts.ports[leader], facts.token, timeout_s=ASK_S)
        except Broken:
            return
        link.send({"join": self._index, "memory": self._memory, "asked": self._asked})
        if self._ready is not None:
            link.send({"ready": self._ready})
        self._link = link
        heard = [time.monotonic()]
        listening = asyncio.ensure_future(self._listen(link, heard))
        looked = turned = time.monotonic()
        try:
            while not listening.done() and not self._closing:
                link.send({"beat": 0})
                await asyncio.wait([listening], timeout=BEAT_S)
                now = time.monotonic()
                heard[0] += max(0.0, now - turned - BEAT_S - STARVED_S)  # this process did not run
                turned = now
                if now - heard[0] > LOST_S:
                    break
                heads = leader == self._index and self._leader is not None and not self._leader.leads
                if heads and now - looked > LOOK_S:
                    looked = now
                    if await self._find() != self._index:
                        break
        finally:
            self._link = None
            if self._closing and not listening.done():
                link.end()
                await asyncio.wait([listening], timeout=LAST_WORDS_S)  # until all is read there
            listening.cancel()
            link.close()
            with self.changed:
                if self.connected:
                    self.losses, self.lost_host = self.losses + 1, self.leader_host
                self.connected = False
                self.changed.notify_all()

    async def _listen(self, link: Link, heard: list[float]) -> None:
        with suppress(Broken):
            while True:
                message = await link.receive()
                heard[0] = time.monotonic()
                if "confirm" in message:
                    link.send({"confirmed": message["confirm"]})
                if "memory" in message:
                    self._memory = message["memory"]
                with self.changed:
                    if "welcome" in message:
                        self.connected, self.leader_host = True, message["welcome"]
                    if "assembly" in message:
                        self.assembly, self.notice, self._ready = message["assembly"], None, None
                    if "notice" in message:
                        self.notice = message
                    if "decision" in message:
                        self.decision = message["decision"]
                        if self._ready is not None:  # judged: the next leader shall not judge it again
                            self._ready = {**self._ready, "cause": None}
                    self.changed.notify_all()

    async def _visited(self, link: Link) -> None:
        """Another node asks who leads, or joins."""
        try:
            async with asyncio.timeout(ASK_S):
                message = await link.receive()
            leader = self._leader
            if "join" not in message or leader is None:
                link.send({"index": self._index, "heads": leader is not None, "leads": bool(leader and leader.leads)})
                await link.flush()
                return
            await self._served(leader, int(message["join"]), link, message)
        except (Broken, TimeoutError):
            pass
        finally:
            link.close()

    async def _served(self, leader: Leader, index: int, link: Link, message: Mapping[str, Any]) -> None:
        if index not in self._facts.good:
            return
        leader.leave(index, "it has connected again")
        leader.join(index, link, message)
        link.send({"welcome": self._facts.hosts[self._index]})
        why = "it has left"
        try:
            while True:
                leader.take(index, await link.receive())
        except Broken as broken:
            why = str(broken)
        finally:
            seat = leader.seats.get(index)
            if seat is not None and seat.link is link:
                leader.leave(index, why)

    async def _turns(self) -> None:
        """The leader's turns, and its beats to all nodes."""
        before = beaten = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            leader = self._leader
            if leader is not None:
                if (starved := now - before - TICK_S) > STARVED_S:
                    leader.forgive(starved)
                leader.tick()
                if now - beaten >= BEAT_S:
                    beaten = now
                    for seat in leader.seats.values():
                        seat.link.send({"beat": 0})
            before = now

    async def _part(self, leader: Leader) -> None:
        deadline = time.monotonic() + FAREWELL_S
        while set(leader.seats) - {self._index} and time.monotonic() < deadline:
            await asyncio.sleep(TICK_S)
        leader.close()


def listening_address(address: str) -> str:
    """Where a node that is reached by ``address`` listens: there. On every interface where its own name does not
    resolve yet, where it is still that of a pod which was here before, and where it stands for loopback, as many a
    distribution sets it: others know it by another number."""
    try:
        family, kind, _, _, (found, *_) = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind((found, 0))
    except OSError:
        return ""
    return "" if str(found).startswith("127.") and not address.startswith("127.") else address
