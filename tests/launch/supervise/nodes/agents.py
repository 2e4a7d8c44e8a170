"""Agents of several nodes in this process, whose ranks are pretended, over connections that a test can cut."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.launching.job import Role
from launch.supervise import causes
from launch.supervise.causes import Cause
from launch.supervise.leader import REJOIN_S, Facts
from launch.supervise.node import Assembly
from launch.supervise.nodes import Several
from launch.supervise.policy import Decision
from pretrain.attempt import ExitClass

TOKEN = b"t" * 32


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, of those that the kernel gives to nobody who asks for any."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        with contextlib.suppress(OSError):
            sockets.append(socket.create_server(("127.0.0.1", random.randrange(20_000, 30_000))))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Wire:
    """A way from one node to another's port: ``cut`` lets nothing through, in silence, as a network does."""

    def __init__(self, port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port, self._to = self._server.getsockname()[1], port
        self._cut = threading.Event()
        self._closed = False
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            while self._cut.is_set() and not self._closed:  # a packet lost, and sent again when it can
                time.sleep(0.05)
            with socket.create_connection(("127.0.0.1", self._to)) as far:
                while not self._closed:
                    if self._cut.is_set():
                        time.sleep(0.05)
                        continue
                    readable, _, _ = select.select([near, far], [], [], 0.05)
                    if self._cut.is_set():
                        continue
                    for one in readable:
                        if not (data := one.recv(2**16)):
                            return
                        (far if one is near else near).sendall(data)

    def cut(self, is_cut: bool = True) -> None:
        (self._cut.set if is_cut else self._cut.clear)()

    def close(self) -> None:
        self._closed = True
        self._server.shutdown(socket.SHUT_RDWR)  # close alone does not wake who accepts
        self._server.close()


@dataclass
class Pretend:
    """An agent whose ranks run until it is told otherwise. ``met``: its attempts, as (number, place); ``last_words``:
    what it tells as it ends."""

    node: Several
    met: list[tuple[int, int]] = field(default_factory=list)
    running: Assembly | None = None
    ended: Decision | None = None
    fault: Cause | None = None
    asked: bool = False
    dead: bool = False
    last_words: Sequence[str] = ()

    def loop(self) -> None:
        while True:
            met = self.node.meet(lambda: self.asked or self.dead)
            if isinstance(met, Decision):
                self.ended = met
                break
            self.met.append((met.attempt, met.group_rank))
            self.running = met
            found = self._run(met)
            self.running = None
            if self.is_dead():
                return
            decision = self.node.agree(found, met.attempt)
            if not decision.again:
                self.ended = decision
                break
        if self.ended is not None:
            for text in self.last_words:
                self.node.told("end", text=text)
            self.node.close(self.ended)

    def is_dead(self) -> bool:
        return self.dead

    def _run(self, met: Assembly) -> Cause:
        while not self.dead:
            if self.fault is not None:
                found, self.fault = self.fault, None
                if found.exit_class is ExitClass.FAULT:
                    self.node.told(
                        "fault", attempt=met.attempt, rank=found.rank, node=self.node.host, kind=found.kind,
                        text=found.text,
                    )  # fmt: skip
                return found
            if other := self.node.notice():
                return other
            time.sleep(0.02)
        return causes.DONE


class Launch:
    """``domains``: of each node; nodes at ``spares`` wait. Every pair of nodes has wires of its own."""

    def __init__(
        self,
        run_dir: Path,
        count: int,
        spares: Sequence[int] = (),
        domains: Sequence[int] = (),
        addresses: Sequence[str] = (),
        rejoin_s: float = REJOIN_S,
    ) -> None:
        roles = [Role(domains[i] if domains else None, i in spares) for i in range(count)]
        ports, hosts = free_ports(count), tuple(f"n{i}" for i in range(count))
        self.wires = {(i, j): Wire(ports[j]) for i in range(count) for j in range(count) if i != j}
        self.agents: list[Pretend] = []
        self.threads: list[threading.Thread] = []
        for i in range(count):
            ways = tuple(ports[j] if i == j else self.wires[i, j].port for j in range(count))
            facts = Facts(
                hosts,
                tuple(addresses) or ("127.0.0.1",) * count,
                ways,
                roles,
                frozenset(range(count)),
                2,
                run_dir,
                100,
                5.0,
                TOKEN,
                rejoin_s=rejoin_s,
            )
            self.agents.append(Pretend(Several(facts, i)))
        for agent in self.agents:
            self.threads.append(threading.Thread(target=agent.loop, daemon=True))
            self.threads[-1].start()

    def cut(self, side: Sequence[int], is_cut: bool = True, one_way: bool = False) -> None:
        """Nothing passes between ``side`` and the rest. ``one_way``: the side can still make connections."""
        for (i, j), wire in self.wires.items():
            if (i in side) != (j in side) and not (one_way and i in side):
                wire.cut(is_cut)

    def die(self, index: int) -> None:
        """The node is gone, as when its machine loses power: nothing comes from it, and nobody answers."""
        self.agents[index].dead = True
        for (i, j), wire in self.wires.items():
            if index in (i, j):
                wire.cut()

    def places(self) -> dict[int, int]:
        """Nodes that run an attempt now, by place."""
        return {agent.running.group_rank: i for i, agent in enumerate(self.agents) if agent.running is not None}

    def close(self) -> None:
        for agent in self.agents:
            agent.dead = True
        for agent in reversed(self.agents):  # who leads is, most often, the first, and waits for the others
            agent.node.close(Decision(False, causes.DONE, ""))
        for wire in self.wires.values():
            wire.close()


@contextlib.contextmanager
def launched(*arguments: object, **known: object) -> Iterator[Launch]:
    launch = Launch(*arguments, **known)  # type: ignore[arg-type]
    try:
        yield launch
    finally:
        launch.close()


def until(what: Callable[[], bool], seconds: float = 20.0) -> float:
    """Seconds until ``what`` holds; fails after so many."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "it did not come to that in time"
        time.sleep(0.02)
    return time.monotonic() - began
