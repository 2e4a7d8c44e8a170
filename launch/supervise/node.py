"""What an agent needs to know of the other nodes, and the case that there is none."""

from __future__ import annotations

import platform
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launch.supervise.causes import Cause, record
from launch.supervise.journal import Journal, RankState
from launch.supervise.policy import Decision, Policy
from pretrain.rundir import attempts


@dataclass(frozen=True)
class Assembly:
    """What the nodes of an attempt have agreed on.

    ``first_rank``: of this node's ranks, which follow one another; ``restarts``: how many attempts of this launch were
    before; ``master``: address and port of rank 0's store.
    """

    attempt: int
    restarts: int
    group_rank: int
    group_size: int
    first_rank: int
    world_size: int
    master: tuple[str, int]
    run_id: str

    def environment(self, local_rank: int, local_size: int) -> dict[str, str]:
        """What torchrun sets for a rank, and the number of the attempt."""
        values = {
            "RANK": self.first_rank + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": local_size,
            "GROUP_RANK": self.group_rank,
            "GROUP_WORLD_SIZE": self.group_size,
            "ROLE_RANK": self.first_rank + local_rank,
            "ROLE_WORLD_SIZE": self.world_size,
            "MASTER_ADDR": self.master[0],
            "MASTER_PORT": self.master[1],
            "TORCHELASTIC_RESTART_COUNT": self.restarts,
            "TORCHELASTIC_RUN_ID": self.run_id,
            "STOKER_ATTEMPT": self.attempt,
        }
        return {name: str(value) for name, value in values.items()}


class Node(Protocol):
    """This node among those of the launch. Only ``meet`` and ``agree`` may take time."""

    host: str

    def meet(self, asked: Callable[[], bool]) -> Assembly | Decision:
        """Wait until the nodes of the next attempt are there. A Decision where none follows on this node; soon so where
        ``asked`` turns true: the launch was asked to end."""

    def notice(self) -> Cause | None:
        """Something that another node has reported since, for which this node's ranks are to end; called twenty times a
        second while they run."""

    def told(self, event: str, **fields: Any) -> None:
        """An event of this node, for the journal; fields as ``Journal.write`` takes them."""

    def states(self, state: str, ranks: Sequence[RankState]) -> None:
        """Where the ranks of this node stand, every two seconds."""

    def agree(self, found: Cause, step: int | None) -> Decision:
        """What all nodes do, now that this one's ranks have ended by ``found`` and begun no step above ``step``."""

    def close(self, decision: Decision) -> None:
        """The launch has ended on this node."""


class Alone:
    """The only node of a launch: it leads, and meets nobody. A context that holds the run's journal."""

    def __init__(
        self,
        run_dir: Path,
        ranks: int,
        max_restarts: int,
        listeners: Sequence[Callable[[dict[str, Any]], None]] = (),
    ) -> None:
        self.host = platform.node()
        self.journal = Journal(run_dir, listeners)
        self.policy = Policy(max_restarts)
        self._ranks = ranks
        self._run_dir = run_dir
        self._attempt = 0
        self._port: socket.socket | None = None
        self._run_id = secrets.token_hex(8)

    def meet(self, asked: Callable[[], bool]) -> Assembly | Decision:
        self._release()
        self._port = reserved_port()
        self._attempt = max(attempts(self._run_dir), default=0) + 1
        master = "127.0.0.1", self._port.getsockname()[1]
        return Assembly(self._attempt, self.policy.restarts, 0, 1, 0, self._ranks, master, self._run_id)

    def notice(self) -> Cause | None:
        return None

    def told(self, event: str, **fields: Any) -> None:
        self.journal.write(event, **fields)

    def states(self, state: str, ranks: Sequence[RankState]) -> None:
        self.journal.ranks(self._attempt, state, ranks)

    def agree(self, found: Cause, step: int | None) -> Decision:
        decision = self.policy.decide(found, step)
        record(self._run_dir, self._attempt, decision.cause)
        return decision

    def close(self, decision: Decision) -> None:
        self._release()
        self.journal.close()

    def _release(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None


def reserved_port(address: str = "127.0.0.1") -> socket.socket:
    """A socket whose port is given to nobody who asks for any, while rank 0 can listen on it: bound for reuse (as the
    store's own socket is) and not listening."""
    reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((address, 0))
    return reservation
