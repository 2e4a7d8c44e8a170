"""The ranks that save and load together, over a gloo group; or one process alone, without torch.distributed.

What crosses the wire is canonical JSON and raw bytes of sizes that both sides know: no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain.checkpoint.damage import Damage, Damaged
from stoker import canonical
from stoker.errors import Refusal


class Peers:
    """``group`` None: this process alone, whatever else runs. Every method with "collective" in its docstring must be
    entered by all ranks of the group in the same order."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and "gloo" not in (backend := dist.get_backend(group)):
            raise Refusal(f"a checkpoint group moves CPU tensors: give a gloo group, this one is {backend}")
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def gather(self, value: Any) -> list[Any]:
        """Collective: the JSON value of every rank, by rank."""
        text = canonical.dumps(value, allow_nan=True).encode()
        if self._group is None:
            return [json.loads(text)]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=self._group)
        longest = max(int(size) for size in sizes)
        mine = torch.from_numpy(np.frombuffer(text.ljust(longest), np.uint8).copy())
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, mine, group=self._group)
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def exchange(self, outgoing: Mapping[int, np.ndarray], incoming: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Collective: send bytes ``{rank: uint8 array}`` and receive ``{rank: number of bytes}``; every size is known
        to both sides, and nobody is asked for an empty message."""
        if self._group is None:
            return {}
        arrived = {rank: torch.empty(size, dtype=torch.uint8) for rank, size in incoming.items()}
        receives = [dist.irecv(buffer, group=self._group, group_src=rank) for rank, buffer in arrived.items()]
        sends = [
            dist.isend(torch.from_numpy(data), group=self._group, group_dst=rank) for rank, data in outgoing.items()
        ]
        for work in (*receives, *sends):
            assert work is not None  # only a rank outside the group gets no handle
            work.wait()
        return {rank: buffer.numpy() for rank, buffer in arrived.items()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """Collective: a body, itself without collectives, that succeeds on every rank or fails on every rank.

        Raises on all ranks Damaged with every rank's findings, else Refusal, else OSError, naming the ranks at fault.
        """
        error: Refusal | Damaged | OSError | None = None
        try:
            yield
        except (Refusal, Damaged, OSError) as caught:
            error = caught
        damage = [vars(found) for found in error.found] if isinstance(error, Damaged) else []
        kind = "refusal" if isinstance(error, Refusal) else "os" if isinstance(error, OSError) else ""
        reports = self.gather({"damage": damage, "kind": kind, "text": str(error)})
        if any(report["damage"] for report in reports):
            findings = (Damage(**found) for report in reports for found in report["damage"])
            raise Damaged(dict.fromkeys(findings)) from error
        for kind, failure in (("refusal", Refusal), ("os", OSError)):
            if guilty := {rank: report["text"] for rank, report in enumerate(reports) if report["kind"] == kind}:
                raise failure(self._blame(guilty)) from error

    def _blame(self, texts: Mapping[int, str]) -> str:
        if self.size == 1:
            return texts[0]
        return "; ".join(f"rank {rank}: {text}" for rank, text in texts.items())
