"""Nodes of a launch meet on the shared path of the run directory, before any of them has a network to meet on.

Every node writes ``.preflight/<launch>/<node>.json``: a fresh random number, its clock, its facts. The leader (first of
the job's nodes) reads them all, judges, and writes ``.verdict.json``, which everybody takes: one verdict, whatever a
node saw itself. A node counts once it has repeated the leader's random number: the path is one in both directions.
Where the leader falls silent the next node judges; a link that fails if the name is there keeps the first verdict for
as long as the launch lasts.

A node that was started again finds a verdict that does not hold its random number. The launch goes on with it where the
verdict counts on it, its own checks are good, and it has what the others have.

Wall clocks are bounded by causality: a file is read after it was written. Only waiting goes by the monotonic clock.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.preflight.compare import Offset, judge
from launch.preflight.facts import Facts
from launch.preflight.report import Verdict
from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic

FORMAT, VERSION = "preflight-node", 1
VERDICT_FORMAT, VERDICT_VERSION, VERDICT = "preflight-verdict", 2, ".verdict.json"
FOLDER = ".preflight"
#: Launches of a run whose files are kept.
KEPT = 8
#: Stands for the nodes that go on, where one that comes late is compared with them.
GOOD = "the others"
#: Seconds between looks; without a new sign of a leader that was there, until it counts as gone (network file systems
#: show changes late); between two nodes that would take its place; and until another's verdict is seen that is there.
LOOK_S, QUIET_S, TURN_S, SHOWN_S = 0.2, 10.0, 0.5, 60.0
#: What a node's file and the verdict may hold at most.
MAX_BYTES = 2**24


@dataclass(frozen=True)
class Launch:
    """One start of a job on several nodes. ``id``: that of no other start, a requeue included. ``node``: this one's
    name, of ``nodes`` in the job's order, spares included; ``needed`` of them train. ``port``: on which the leader
    listens. ``quiet_s``: seconds without a sign of the leader, until another judges.

    ``segment``: nodes in a row that lie in one NVLink domain. ``share_hosts``: nodes may be one host, as in tests.
    """

    id: str
    node: str
    nodes: tuple[str, ...]
    needed: int
    port: int | None = None
    segment: int | None = None
    timeout_s: float = 60.0
    quiet_s: float = QUIET_S
    share_hosts: bool = False

    def __post_init__(self) -> None:
        for name in (self.id, *self.nodes):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}", name):
                raise Refusal(
                    f"launch: {name!r} cannot name a launch or a node: letters, digits, dot, dash, underscore"
                )
        if len(set(self.nodes)) != len(self.nodes):
            twice = next(node for node in self.nodes if self.nodes.count(node) > 1)
            raise Refusal(f"launch {self.id}: node {twice} is listed twice: every node has a name of its own")
        if self.node not in self.nodes:
            raise Refusal(f"launch {self.id}: this node, {self.node}, is not one of {', '.join(self.nodes)}")
        if not 1 <= self.needed <= len(self.nodes):
            raise Refusal(f"launch {self.id}: {self.needed} nodes are to train, of {len(self.nodes)}")

    @property
    def index(self) -> int:
        return self.nodes.index(self.node)


@dataclass
class _Record:
    """A node's file. ``echo``: the leader's random number and clock as this node read them, and its own clock then."""

    nonce: str
    clock: float
    facts: Facts
    echo: tuple[str, float, float] | None = None


def exchange(
    launch: Launch, facts: Facts, run_dir: Path, wall: Callable[[], float] = time.time
) -> tuple[Verdict, str | None]:
    """Take part in the comparison. Returns the one verdict of the launch, and why this node takes no part in a launch
    that goes on; None where it does take part, and where the verdict stops all.

    Raises Refusal where the folder cannot be used.
    """
    folder = run_dir / FOLDER / launch.id
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if launch.index == 0:
            _prune(folder.parent, launch.id)
        return _Meeting(launch, facts, folder, wall).outcome()
    except OSError as error:
        why = error.strerror or error
        raise Refusal(f"{launch.node}: {folder} cannot be used: {why}. Choose another run.dir") from None


def goes_on(launch: str, run_dir: Path, node: str | None = None) -> bool:
    """Whether the nodes of a launch have come to a verdict with which they can go on, and that counts on ``node``."""
    try:
        verdict = _verdict(json.loads((run_dir / FOLDER / launch / VERDICT).read_bytes()))
        return verdict.trouble is None and (node is None or node in verdict.good)
    except (OSError, KeyError, TypeError, ValueError):
        return False


def _verdict(value: Any) -> Verdict:
    fields = value["verdict"]
    return Verdict(
        tuple(fields["good"]),
        dict(fields["excluded"]),
        int(fields["needed"]),
        int(fields["total"]),
        tuple(fields["warnings"]),
    )


def _prune(parent: Path, current: str) -> None:
    """Remove the oldest launches' files."""
    others = [path for path in parent.iterdir() if path.name != current and path.is_dir()]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[: 1 - KEPT]:
        shutil.rmtree(path, ignore_errors=True)


class _Meeting:
    def __init__(self, launch: Launch, facts: Facts, folder: Path, wall: Callable[[], float]) -> None:
        self.launch = launch
        self.folder = folder
        self.wall = wall
        self.mine = _Record(uuid.uuid4().hex, wall(), facts)
        self.found: dict[str, _Record] = {}
        self.offsets: dict[str, Offset] = {}
        self._tick: float | None = None

    def outcome(self) -> tuple[Verdict, str | None]:
        return self._lead() if self.launch.index == 0 else self._follow()

    def _lead(self) -> tuple[Verdict, str | None]:
        deadline = time.monotonic() + self.launch.timeout_s
        while (standing := self._standing()) is None:
            self._write()  # its clock ticks
            if self._gather() or time.monotonic() > deadline:
                return self._decide()
            time.sleep(LOOK_S)
        return standing

    def _follow(self) -> tuple[Verdict, str | None]:
        turn = TURN_S * (self.launch.index - 1)
        deadline = time.monotonic() + self.launch.timeout_s + turn
        self._write()
        while (standing := self._standing()) is None:
            if self._hear_leader():
                deadline = time.monotonic() + self.launch.quiet_s + turn
            if time.monotonic() > deadline:
                self._gather()
                return self._decide()
            time.sleep(LOOK_S)
        return standing

    def _gather(self) -> bool:
        """Read what the others wrote. True once every node is there; the leader waits for their answers to it."""
        launch = self.launch
        self.found[launch.node] = self.mine
        for node in launch.nodes:
            if node == launch.node or node in self.offsets:
                continue
            if (record := self._read(node)) is None:
                continue
            if launch.index > 0:
                if node != launch.nodes[0]:  # which is silent
                    self.found[node] = record
            elif record.echo is not None and record.echo[0] == self.mine.nonce:
                self.found[node] = record
                _, tick, read = record.echo
                # Written before it was read here, and the tick was written here before it was read there.
                self.offsets[node] = Offset(record.clock - self.wall(), read - tick)
        return len(self.found) == len(launch.nodes)

    def _hear_leader(self) -> bool:
        """Whether the leader's clock has moved since the last look. When it first does, tell what was read and when: a
        value that stood there before may be that of a leader which is gone, and has been started again."""
        leader = self._read(self.launch.nodes[0])
        if leader is None or leader.clock == self._tick:
            return False
        before, self._tick = self._tick, leader.clock
        if before is not None and (self.mine.echo is None or self.mine.echo[0] != leader.nonce):
            self.mine.echo = leader.nonce, leader.clock, self.wall()
            self._write()
        return True

    def _decide(self) -> tuple[Verdict, str | None]:
        launch = self.launch
        silence = (
            f"did not answer in {self.folder} within {launch.timeout_s:g} s: it is down, or run.dir is not one path "
            "for all nodes"
        )
        known = {node: record.facts for node, record in self.found.items()}
        verdict = judge(launch.nodes, launch.needed, known, self.offsets, silence, launch.segment, launch.share_hosts)
        content = json.dumps(
            {
                "format": formats.stamp(VERDICT_FORMAT, VERDICT_VERSION),
                "by": launch.node,
                "nonces": {node: record.nonce for node, record in self.found.items()},
                "facts": known[verdict.good[0]].to_dict() if verdict.good else None,
                "verdict": asdict(verdict),
            },
            indent=2,
        )
        draft = self.folder / f".{launch.node}.{self.mine.nonce}.json"
        write_atomic(draft, content)
        try:
            with suppress(FileExistsError):  # of a node that was faster, and it stands
                os.link(draft, self.folder / VERDICT)
        finally:
            draft.unlink(missing_ok=True)
        deadline = time.monotonic() + SHOWN_S
        while (standing := self._standing()) is None:
            if time.monotonic() > deadline:
                raise Refusal(f"{launch.node}: {self.folder / VERDICT} is there, and is not seen after {SHOWN_S:g} s")
            time.sleep(LOOK_S)
        return standing

    def _standing(self) -> tuple[Verdict, str | None] | None:
        """The verdict, and why this node takes no part; None while there is none."""
        node, path = self.launch.node, self.folder / VERDICT
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            value = json.loads(content)
            formats.require(value, VERDICT_FORMAT, VERDICT_VERSION, path)
            verdict = _verdict(value)
            if verdict.trouble is not None:
                return verdict, None
            if node not in verdict.good:
                return verdict, verdict.excluded[node]
            if value["nonces"][node] == self.mine.nonce:
                return verdict, None
            return verdict, self._unlike(Facts.from_dict(value["facts"]))
        except (KeyError, TypeError, ValueError) as error:  # Refusal is a ValueError
            known = Verdict((), {}, self.launch.needed, len(self.launch.nodes))
            return known, f"what the launch decided cannot be read ({error}): another release of Stoker?"

    def _unlike(self, good: Facts) -> str | None:
        """Why this node, which comes late, cannot be one with those that go on; ``good``: what one of them stated."""
        nodes = GOOD, self.launch.node
        verdict = judge(nodes, 1, {GOOD: good, self.launch.node: self.mine.facts}, {}, "", share_hosts=True)
        return verdict.excluded.get(self.launch.node)

    def _write(self) -> None:
        self.mine.clock = self.wall()
        content = {
            "format": formats.stamp(FORMAT, VERSION),
            "nonce": self.mine.nonce,
            "clock": self.mine.clock,
            "echo": self.mine.echo,
            "facts": self.mine.facts.to_dict(),
        }
        write_atomic(self.folder / f"{self.launch.node}.json", json.dumps(content))

    def _read(self, node: str) -> _Record | None:
        value = self._read_json(self.folder / f"{node}.json")
        if value is None:
            return None
        try:
            formats.require(value, FORMAT, VERSION, node)
            echo = value["echo"]
            record = _Record(str(value["nonce"]), float(value["clock"]), Facts.from_dict(value["facts"]))
            record.echo = (str(echo[0]), float(echo[1]), float(echo[2])) if echo else None
            return record
        except (KeyError, TypeError, ValueError, IndexError) as error:
            refused = f"what it wrote cannot be read ({error}): another release of Stoker?"
            return _Record("", 0.0, Facts(node, "", refused=refused), echo=(self.mine.nonce, 0.0, 0.0))

    def _read_json(self, path: Path) -> Mapping[str, Any] | None:
        with suppress(OSError, ValueError), open(path, "rb") as file:
            value = json.loads(file.read(MAX_BYTES))
            if isinstance(value, dict):
                return value
        return None
