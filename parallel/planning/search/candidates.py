"""Candidates: the layouts that a model and a machine allow, as plain numbers. No torch.

How each may be run is ``ways.py``, which is best ``planner.py``.

Without ``what_if`` only what the engine supports (``capabilities.py``) is enumerated. Tensor, context and expert groups
stay inside a domain; pipeline and data parallelism go across. Only under ``what_if`` may experts span hosts that are a
domain each, as the dispatchers made for it (DeepEP) do; never racks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from typing import NamedTuple

from parallel.planning.capabilities import supported
from parallel.planning.plan import nearest_divisors
from parallel.planning.search.problem import Problem
from parallel.planning.search.stages import StageChoice
from stoker.errors import Refusal

#: A micro-batch has at most so many sequences, more only while it has no more tokens than the second number.
MICRO_BATCH, MICRO_BATCH_TOKENS = 8, 32768
#: Context parallelism leaves a rank at least so many tokens (NVIDIA's guidelines for MoE training: from 8K on).
CONTEXT_TOKENS = 4096
#: The widest tensor-parallel group: twice that of any published run (``published_training_runs.csv``; but Neuron's).
TENSOR_RANKS = 16
#: The widest expert group that a dispatcher takes (HybridEP refuses more, Megatron-Bridge utils.py, 2026-08).
EXPERT_RANKS = 72
#: Bytes that a row of an expert's grouped product is a multiple of (torch.nn.functional.grouped_mm, torch 2.13).
EXPERT_ROW_BYTES = 16

#: Why a candidate is refused, as the end of "12 layouts ...".
DOMAIN = "with a tensor, context or expert group across domains"
BATCH = "without a data-parallel degree that divides global_batch over these GPUs"
TOKENS = "with tokens of a micro-batch that tp does not divide"
INTERLEAVING = "with fewer micro-batches to interleave than pipeline ranks"


class Degrees(NamedTuple):
    """A layout in numbers, or many in arrays. ``domain_ranks``: ranks that a domain takes (``Placement``)."""

    tp: int
    cp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    dp: int
    micro_batch: int
    domain_ranks: int

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def edp(self) -> int:
        return self.world_size // (self.etp * self.ep * self.pp)

    def degree(self, axis: str) -> int:
        return int(getattr(self, axis))

    def micro_batches(self, global_batch: int) -> int:
        return global_batch // (self.dp * self.micro_batch)


class Space:
    """Every candidate of a problem. ``refused`` counts those that are not, by reason, as they are met."""

    def __init__(self, problem: Problem, stages: StageChoice) -> None:
        self.problem, self.workload, self.stages = problem, problem.workload, stages
        self.refused: Counter[str] = Counter()

    def degrees(self) -> Iterator[Degrees]:
        problem, domain = self.problem, self.problem.topology.domain
        experts = list(product(self._degrees_of("etp"), self._degrees_of("ep")))
        for tp, cp in product(self._degrees_of("tp"), self._context()):
            if tp == 1 and problem.fixed.get("sequence_parallel"):
                continue  # it shards over tensor-parallel ranks
            if tp * cp > min(domain.size, problem.gpus):
                self.refused[DOMAIN] += 1
                continue
            for etp, ep in experts:
                if etp not in (1, tp) and "etp" not in problem.fixed:
                    continue  # each expert whole, or cut as the rest of the layer is
                for ranks, capacity in self.domains(tp * cp, etp * ep):
                    yield from self._pipelines(tp, cp, ep, etp, ranks, capacity)

    def _pipelines(self, tp: int, cp: int, ep: int, etp: int, ranks: int, capacity: int) -> Iterator[Degrees]:
        problem, layers = self.problem, len(self.workload.layers)
        for pp in self._pipeline_degrees(capacity // (tp * cp)):
            dp = self._data(tp * cp, pp, ep * etp, capacity)
            if dp is None:
                self.refused[BATCH] += 1
                continue
            for micro_batch in self.micro_batches_of(problem.global_batch // dp):
                tokens = micro_batch * self.workload.seq_len // cp
                if tokens % tp and (self.workload.has_experts or problem.fixed.get("sequence_parallel")):
                    self.refused[TOKENS] += 1
                    continue
                count = problem.global_batch // (dp * micro_batch)
                for vpp in self.problem.choices("vpp", self.stages.chunks(pp)):
                    if vpp > 1 and (pp == 1 or count < pp or vpp * pp > layers):
                        self.refused[INTERLEAVING] += 1
                        continue
                    yield Degrees(tp, cp, pp, vpp, ep, etp, dp, micro_batch, ranks)

    def _degrees_of(self, axis: str) -> list[int]:
        """Degrees that divide all that the axis cuts."""
        fixed = self.problem.fixed.get(axis)
        sizes = [rule.size for rule in self.workload.divisors() if rule.axis == axis]
        if not sizes or not (supported(axis) or self.problem.what_if):
            if fixed not in (None, 1):
                raise Refusal(f"{axis}={fixed}: the model has nothing that {axis} cuts; set {axis}=1")
            return [1]
        size = math.gcd(*sizes)
        if fixed is not None:
            if size % fixed:
                near = " or ".join(f"{axis}={value}" for value in nearest_divisors(size, fixed))
                raise Refusal(f"{axis}={fixed} does not divide the model's {size}: nearest that do are {near}")
            return [fixed]
        most = min(size, self.problem.gpus, EXPERT_RANKS if axis == "ep" else TENSOR_RANKS)
        return [d for d in range(1, most + 1) if size % d == 0 and (axis != "etp" or self._aligned(d))]

    def _aligned(self, etp: int) -> bool:
        """Whether rows of the experts' grouped products can be read where experts are cut over ``etp``."""
        if self.workload.element_bytes == 8:
            return True  # expert by expert
        step = EXPERT_ROW_BYTES // self.workload.element_bytes
        widths = {rule.size for rule in self.workload.divisors() if rule.axis == "etp"}
        return all(width % (step * etp) == 0 for width in widths)

    def _context(self) -> list[int]:
        """Degrees of context parallelism: two parts a rank balance a causal window."""
        length = self.workload.seq_len
        if not (supported("cp") or self.problem.what_if):
            return self.problem.choices("cp", [1])
        longest = max(1, min(length // CONTEXT_TOKENS, self.problem.topology.domain.size))
        return self.problem.choices("cp", [cp for cp in range(1, longest + 1) if cp == 1 or length % (2 * cp) == 0])

    def domains(self, dense: int, expert: int) -> list[tuple[int, int]]:
        """(ranks to take of each domain, ranks in all) that keep groups of ``dense`` and of ``expert`` ranks inside a
        domain: what practice takes, else as many as whole groups on whole hosts can be."""
        topology, gpus = self.problem.topology, self.problem.gpus
        size, group = topology.domain.size, math.lcm(dense, expert)
        if expert > size and self._spans_hosts(expert) and size % dense == 0:
            group = dense
        step = math.lcm(group, topology.domain.per_host)
        if gpus <= size and group <= gpus:
            return [(size, gpus)]
        if gpus <= size or step > size:
            self.refused[DOMAIN] += 1
            return []
        usual = [ranks for ranks in (size - topology.spares, *topology.domain.practice) if ranks % step == 0]
        fills = list(dict.fromkeys(usual or [size // step * step]))
        whole, rest = divmod(gpus, size)
        return [(fills[0], gpus)] if rest else [(ranks, whole * ranks) for ranks in fills]

    def _spans_hosts(self, expert: int) -> bool:
        domain = self.problem.topology.domain
        hosts = domain.size == domain.per_host and expert % domain.size == 0
        return hosts and expert <= EXPERT_RANKS and (self.problem.what_if or supported("deepep"))

    def _pipeline_degrees(self, most: int) -> list[int]:
        """Powers of two, degrees that share out the layers (embedding and head counted as one, or not), and degrees
        that leave no GPU idle."""
        layers = len(self.workload.layers)
        natural = (
            p
            for p in range(1, min(layers, most) + 1)
            if p & (p - 1) == 0 or most % p == 0 or any((layers + ends) % p == 0 for ends in (0, 1, 2))
        )
        return self.problem.choices("pp", natural)

    def _data(self, dense: int, pp: int, expert: int, capacity: int) -> int | None:
        """The largest data-parallel degree that divides the batch and fits on whole hosts; None where there is none."""
        problem, domain = self.problem, self.problem.topology.domain
        cut, step = dense * pp, expert // math.gcd(expert, dense)
        most = capacity // cut if pp <= len(self.workload.layers) else 0
        for dp in self.problem.choices("dp", [most] if problem.exact else self._batch_divisors):
            if not 0 < dp <= most or problem.global_batch % dp or dp % step:
                continue
            world = cut * dp
            if (world <= domain.size or world % domain.per_host == 0) and (world == problem.gpus or not problem.exact):
                return dp
        return None

    @cached_property
    def _batch_divisors(self) -> list[int]:
        batch = self.problem.global_batch
        small = [d for d in range(1, math.isqrt(batch) + 1) if batch % d == 0]
        return sorted({*small, *(batch // d for d in small)}, reverse=True)

    def micro_batches_of(self, sequences: int) -> list[int]:
        """Sizes that cut the ``sequences`` of a data-parallel rank: powers of two, or all at once."""
        most = min(sequences, max(MICRO_BATCH, MICRO_BATCH_TOKENS // self.workload.seq_len))
        sizes = self.problem.choices(
            "micro_batch", [*(2**n for n in range(most.bit_length())), *(most,) * (most == sequences)]
        )
        return [size for size in dict.fromkeys(sizes) if sequences % size == 0]
