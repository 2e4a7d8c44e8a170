"""Stages for a search: which layers lie in which chunk, and how many chunks a rank may have. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.planning.plan import Stages, balanced_stages
from parallel.planning.workload import Workload

#: Chunks of a pipeline rank that are tried.
CHUNKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
#: Share of a load that is worth another layout.
WORTH = 0.001


class StageChoice:
    """Stages of one model, weighed by the FLOPs of its layers and of its head."""

    def __init__(self, workload: Workload) -> None:
        self.costs = [layer.forward_flops + layer.backward_flops for layer in workload.layers]
        self.head = workload.head.forward_flops + workload.head.backward_flops
        self._found: dict[tuple[int, int], Stages] = {}

    def chunks(self, pp: int) -> list[int]:
        """Chunks that a pipeline rank may have."""
        return [vpp for vpp in CHUNKS if vpp == 1 or (pp > 1 and pp * vpp <= len(self.costs))]

    def stages(self, pp: int, vpp: int) -> Stages:
        """Layers over chunks: as many each, or as much work each where that leaves the busiest pipeline rank less."""
        if (pp, vpp) not in self._found:
            even = balanced_stages(len(self.costs), pp * vpp)
            shared = _shared_out(self.costs, self.head, pp * vpp)
            better = self._busiest(shared, pp) < (1 - WORTH) * self._busiest(even, pp)
            self._found[pp, vpp] = shared if better else even
        return self._found[pp, vpp]

    def _busiest(self, stages: Stages, pp: int) -> float:
        loads = [sum(self.costs[layer] for chunk in stages[rank::pp] for layer in chunk) for rank in range(pp)]
        return max([*loads[:-1], loads[-1] + self.head])


def _shared_out(costs: Sequence[float], head: float, chunks: int) -> Stages:
    """Layers in order over ``chunks``, each chunk ending where the sum of costs is nearest its share of the whole."""
    total, count = sum(costs) + head, len(costs)
    ends, end, done = [], 0, 0.0
    for chunk in range(1, chunks):
        target, last = total * chunk / chunks, count - (chunks - chunk)
        done, end = done + costs[end], end + 1
        while end < last and done + costs[end] / 2 <= target:
            done, end = done + costs[end], end + 1
        ends.append(end)
    return tuple(tuple(range(a, b)) for a, b in zip([0, *ends], [*ends, count], strict=True))
