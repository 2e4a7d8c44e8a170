"""The stream of a run on one rank, from the data log as rank 0 reads it.

Rank 0 alone writes and reads ``data_log.jsonl`` and hands its bytes to the others, so that no two ranks can follow
different logs, on whatever file system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from dataio.log import DataLog
from dataio.store import Store
from dataio.stream import BlendedStream
from dataio.types import Batch, BatchPlan, Part
from pretrain.config import RunConfig
from pretrain.data import DATA_LOG, first_log, segment_of
from pretrain.guards import rewind
from stoker.errors import Refusal


class Feed:
    """Reads this rank's part of any step; collective over ``control``, a gloo group of all ranks.

    ``changed``: the configuration says something else of the data than at the last attempt, and may: it is appended to
    the log from ``first_step`` on. Otherwise the log wins over the configuration, and ``note`` says where (on rank 0).
    """

    def __init__(
        self,
        config: RunConfig,
        stores: Mapping[str, Store],
        control: dist.ProcessGroup,
        first_step: int,
        changed: bool,
    ) -> None:
        self._path = config.run_dir / DATA_LOG
        self._stores, self._control = stores, control
        self._size = 0
        self.note = ""
        self._told(lambda: self._keep(config, first_step, changed))
        self._receive()

    def _keep(self, config: RunConfig, first_step: int, changed: bool) -> None:
        """Rank 0: write the log of a new run, or append what was changed."""
        if not self._path.exists():
            first_log(config, self._stores).write(self._path)
            return
        log, wanted = DataLog.open(self._path), segment_of(config, self._stores, first_step)
        if changed:
            log.append(wanted, first_step)
        else:
            holds = log.standing[log.segment_at(first_step)]
            fields = ("seq_len", "global_batch", "blend", "datasets")
            if differing := [name for name in fields if getattr(holds, name) != getattr(wanted, name)]:
                self.note = f"{self._path} wins over the configuration in {', '.join(differing)}"

    def require_state(self, state: Mapping[str, Any], next_step: int) -> None:
        """Refuse a checkpoint whose data this run does not continue."""
        self.stream.require_state(state, next_step, f"checkpoint of step {next_step}")

    def read(
        self, step: int, part: Part, planned: Callable[[BatchPlan], None] = lambda plan: None
    ) -> tuple[BatchPlan, Batch]:
        """The step's addresses, which ``planned`` is told before a token is read, and the tokens of one part."""
        self._follow(step)
        plan = self.stream.plan(step)
        planned(plan)
        return plan, self.stream.read(plan, part)

    def pass_over(self, step: int) -> None:
        """From now on ``step`` reads the batch after the one that it read: a line of the log says so."""
        self._told(lambda: rewind.pass_over(self._path, step))
        self._receive()

    def rewinds(self, known: int) -> int:
        """How often batches were passed over since the log had ``known`` segments."""
        return rewind.rewinds(self.stream.log, known)

    def changes(self, step: int) -> bool:
        """Other data begin at ``step`` than were read before."""
        return rewind.changes(self.stream.log, step)

    def _follow(self, step: int) -> None:
        """Take over what was appended to the log since the last step."""
        size = torch.tensor([self._path.stat().st_size if self._rank == 0 else 0])
        dist.broadcast(size, group=self._control, group_src=0)
        if int(size) != self._size:
            before = self.stream.log
            self._receive()
            if self.stream.log.segments[: len(before.segments)] != before.segments:
                raise Refusal(f"{self._path}: lines were changed while the run read it; restore them and resume")
            self.stream.require_future(len(before.segments), step)

    def _receive(self) -> None:
        """The log's bytes from rank 0; every rank makes the same stream of them, or refuses alike."""
        content: list[bytes] = [self._path.read_bytes() if self._rank == 0 else b""]
        dist.broadcast_object_list(content, group=self._control, group_src=0)
        self._size = len(content[0])
        self.stream = BlendedStream(DataLog.parse(content[0], self._path), self._stores)

    def _told(self, act: Callable[[], None]) -> None:
        """Rank 0 acts; if it refuses, every rank does."""
        refused: list[str | None] = [None]
        if self._rank == 0:
            try:
                act()
            except Refusal as refusal:
                refused = [str(refusal)]
        dist.broadcast_object_list(refused, group=self._control, group_src=0)
        if refused[0] is not None:
            raise Refusal(refused[0])

    @property
    def _rank(self) -> int:
        return self._control.rank()
