"""One node of several, as its agent sees it (``node.Node``): the connection to the launch's leader, and what follows
where it breaks."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch.supervise import causes, outcome
from launch.supervise.causes import Cause
from launch.supervise.journal import RankState
from launch.supervise.leader import CONCLUDE_S, REJOIN_S, Facts
from launch.supervise.member import Member
from launch.supervise.node import Assembly, reserved_port
from launch.supervise.policy import Decision
from launch.supervise.wire import shared_token
from pretrain.attempt import Exit, ExitClass

if TYPE_CHECKING:
    from launch.launching.job import Job
    from launch.launching.where import Where
    from pretrain.config import RunConfig

#: Seconds beyond ``Facts.rejoin_s`` for a node to be connected again; and to be told what follows.
APART_S, DECISION_S = 60.0, 300.0
#: Seconds until Kubernetes moves the pods of a host that it does not hear, where nothing else is asked for
#: (Kubernetes' documentation, "Taint based Evictions").
UNHEARD_S = 300.0
#: Seconds to stay where nobody is connected and the launch was asked to end.
ALONE_S = 3.0
POLL_S = 0.05
#: Seconds between two looks of a node that waits, and is led by no other, at whether the launch has ended.
LOOK_S = 2.0


def several(config: RunConfig, job: Job, here: Where, good: Sequence[str]) -> Several:
    """This node of a launch of several; ``good``: the hosts that passed the preflight, in job order."""
    from launch.launching.where import PULLING_S
    from launch.local import listeners

    ports = tuple(job.port + (index if here.one_machine else 0) for index in range(len(here.hosts)))
    facts = Facts(
        hosts=here.hosts,
        addresses=here.addresses,
        ports=ports,
        roles=job.roles(),
        good=frozenset(here.hosts.index(host) for host in good),
        ranks=job.ranks_per_node,
        run_dir=config.run_dir,
        max_restarts=config.launch.max_restarts,
        grace_s=config.launch.grace_s,
        token=shared_token(outcome.token_path(config.run_dir, here.start)),
        launch=here.start,
        rejoin_s=UNHEARD_S + PULLING_S if here.comes_back else REJOIN_S,
        listeners=listeners(config),
    )
    return Several(facts, here.index)


class Several:
    """Implements ``node.Node``. ``index``: of this node among ``facts.hosts``. ``alone``: where this node ended, nobody
    said to it that the launch has."""

    def __init__(self, facts: Facts, index: int) -> None:
        self.host = facts.hosts[index]
        self.alone = True
        self._facts, self._index = facts, index
        self._member = Member(facts, index)
        self._port: socket.socket | None = None
        self._attempt = 0
        self._losses = 0
        self._noticed: Cause | None = None
        self._unjudged: tuple[Cause, int | None] | None = None

    def meet(self, asked: Callable[[], bool]) -> Assembly | Decision:
        self._release()
        address = self._facts.addresses[self._index]
        self._port = reserved_port(address if address.startswith("127.") else "")  # its name may not resolve yet
        ready: dict[str, Any] = {
            "port": self._port.getsockname()[1],
            "attempt": self._attempt,
            "cause": None,
            "step": None,
        }
        if self._unjudged is not None:
            cause, step = self._unjudged
            ready |= {"cause": cause.to_dict(), "step": step}
            self._unjudged = None
        member = self._member
        look_at = time.monotonic()
        apart_since: float | None = None
        asked_at: float | None = None
        if asked():
            asked_at = look_at
            member.ask_to_end()  # first, so that no attempt counts on this node
        member.wait_for_attempt(ready)
        while True:
            member.check()
            with member.changed:
                member.changed.wait(POLL_S)
                assembly, decision, connected = member.assembly, member.decision, member.connected
                losses = member.losses
            if decision is not None and not decision["again"]:
                return self._decided(decision)
            if assembly is not None:
                self._losses, self._attempt, self._noticed = losses, int(assembly["attempt"]), None
                return Assembly(**{**assembly, "master": tuple(assembly["master"])})
            now = time.monotonic()
            if now >= look_at and (not connected or member.heads):
                look_at = now + LOOK_S
                if (over := self._over()) is not None:
                    return over
            apart_since = None if connected else apart_since or now
            limit = self._facts.rejoin_s + APART_S
            if apart_since is not None and now - apart_since > limit:
                text = f"{self.host} was connected to no node that leads for {limit:.0f} s"
                return Decision(False, causes.fault("node", text, host=self.host), text)
            if asked() and asked_at is None:
                asked_at = now
                member.ask_to_end()
            # One that leads, or counts for the majority, stays until the others have saved.
            patience = self._facts.grace_s + CONCLUDE_S if connected else ALONE_S
            if asked_at is not None and now - asked_at > patience:
                return Decision(False, causes.PREEMPTED, "asked to end")

    def _over(self) -> Decision | None:
        """How the launch has ended, where this node was not there when it did."""
        facts = self._facts
        code = outcome.ended(facts.run_dir, facts.launch)
        if code is None:
            return None
        outcome.token_path(facts.run_dir, facts.launch).unlink(missing_ok=True)  # made again as this node came
        text = f"{self.host}: launch {facts.launch} has ended with {code}"
        print(text, file=sys.stderr, flush=True)
        self.alone = False
        (ended,) = (Exit(each, text, None) for each in ExitClass if each.code == code)
        return Decision(False, Cause(ended.exit_class, ended.kind, text), text)

    def notice(self) -> Cause | None:
        member = self._member
        member.check()
        with member.changed:
            if member.losses != self._losses:
                text = f"{self.host} was cut off from {member.lost_host}, which led the launch"
                return causes.fault("node", text, host=member.lost_host)
            if member.notice is not None and member.notice["attempt"] == self._attempt:
                self._noticed = Cause.from_dict(member.notice["notice"])
                return self._noticed
        return None

    def told(self, event: str, **fields: Any) -> None:
        self._member.say({"told": {"event": event, "fields": fields}})

    def states(self, state: str, ranks: Sequence[RankState]) -> None:
        self._member.say({"states": {"state": state, "ranks": [asdict(rank) for rank in ranks]}})

    def agree(self, found: Cause, step: int | None) -> Decision:
        member = self._member
        with member.changed:
            apart = member.losses != self._losses
        if not apart:
            own = None if found == self._noticed else found.to_dict()
            member.say({"found": {"attempt": self._attempt, "cause": own, "step": step}})
        deadline = time.monotonic() + DECISION_S
        while not apart and time.monotonic() < deadline:
            member.check()
            with member.changed:
                member.changed.wait(POLL_S)
                decision, apart = member.decision, member.losses != self._losses
            if decision is not None and (not decision["again"] or decision["attempt"] == self._attempt):
                return self._decided(decision)
        # The one that would have decided is gone: the next one will, from what all nodes tell it.
        self._unjudged = found, step
        print(f"{found}; meeting the other nodes again", file=sys.stderr, flush=True)
        return Decision(True, found, str(found))

    def _decided(self, said: Mapping[str, Any]) -> Decision:
        """What the leader said; that of a part which gave up has not ended the launch."""
        self.alone = bool(said["again"] or said.get("alone"))
        return Decision.from_dict(said)

    def close(self, decision: Decision) -> None:
        self._release()
        self._member.close()

    def _release(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None
