"""What a model costs to serve: a roofline of decoding, where caches that grow meet states that do not. No torch.

    serving = serve(workload, caches, topology, context=131_072)
    serving.device_seconds, serving.batch, serving.bound

A step makes one token for each sequence of the batch. It cannot end before the memory has read the weights that the
batch meets and every sequence's cache, nor before the products are done, nor before the links have carried what the
ranks exchange; the slowest of the three is its time. That bounds cost from below: ``NOT_MODELLED`` is missing in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.planning.hardware.collectives import Span, all_reduce_s, all_to_all_s
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload
from stoker.errors import Refusal

NOT_MODELLED = (
    "prefill",
    "efficiency below the roofline, and host launches",
    "uneven routing and uneven lengths of sequences",
    "speculative decoding and shared prefixes",
)
#: Kept free of weights and caches: context, communication buffers, fragmentation (4 to 6 GB of a training process).
RESERVED_BYTES = 6e9
#: A batch that is this near to the least cost, as a ratio, is large enough: larger ones only make users wait.
ENOUGH = 1.01
#: Fewer devices are taken unless more are cheaper by this ratio: nothing overlaps as wholly as in a roofline.
FEWER = 1.1
#: Domains that one copy of a model may span.
MOST_DOMAINS = 4
ACTIVATION_BYTES = 2
#: Of a weight, stored as it is multiplied; else as activations are.
WEIGHT_BYTES = {"float64": 8.0, "float32": 4.0, "fp8": 1.0, "fp8_block": 1.0, "mxfp8": 1.0, "nvfp4": 0.5}


@dataclass(frozen=True)
class Cache:
    """What a layer keeps of a sequence: ``token_bytes`` for each of its tokens (of the last ``window``), and a state of
    ``state_bytes`` however long it is, read and written once a step. FLOPs of one new token likewise. Tensor
    parallelism cuts it in at most ``parts``, its heads; more ranks hold copies."""

    parts: int
    token_bytes: float = 0.0
    token_flops: float = 0.0
    window: int | None = None
    state_bytes: float = 0.0
    state_flops: float = 0.0

    def kept_bytes(self, context: int) -> float:
        return self.state_bytes + self.token_bytes * min(context, self.window or context)

    def moved_bytes(self, context: int) -> float:
        return self.state_bytes + self.kept_bytes(context)

    def flops(self, context: int) -> float:
        return self.state_flops + self.token_flops * min(context, self.window or context)


def grouped_query(
    heads: int, kv_heads: int, head_dim: int, window: int | None = None, element_bytes: float = ACTIVATION_BYTES
) -> Cache:
    """Keys and values of softmax attention; scores and weighted sum are 4 FLOPs a head, dim and cached token."""
    return Cache(kv_heads, 2 * kv_heads * head_dim * element_bytes, 4 * heads * head_dim, window)


def latent(heads: int, kv_lora: int, rope: int, element_bytes: float = ACTIVATION_BYTES) -> Cache:
    """Multi-head latent attention in its absorbed form: every head reads the one latent (DeepSeek-V2, arXiv 2405.04434,
    section 2.1). DeepSeek-V3's 61 layers keep 70,272 bytes a token (arXiv 2505.09343, table 1)."""
    return Cache(1, (kv_lora + rope) * element_bytes, 2 * heads * (2 * kv_lora + rope))


def delta_state(heads: int, key_dim: int, value_dim: int, element_bytes: float = 4) -> Cache:
    """State of a delta rule, a matrix a head: decay it, read the old value, write the difference, read the answer
    (arXiv 2412.06464, equation 10)."""
    cells = heads * key_dim * value_dim
    return Cache(heads, state_bytes=cells * element_bytes, state_flops=7 * cells)


@dataclass(frozen=True)
class Serving:
    """Decoding. ``devices`` hold one copy of the model, the fewest that cost no more than ``FEWER`` of the best number;
    ``batch`` sequences are decoded together, the fewest within ``ENOUGH`` of a batch that fills the memory, ``most``.

    ``token_s``: between two tokens of a sequence. ``bound``: what sets it. ``device_seconds``: of a million tokens;
    ``cost``: its price in the currency of ``price_per_hour``, None where no price was given.
    """

    context: int
    devices: int
    batch: int
    most: int
    token_s: float
    bound: str
    device_seconds: float
    cost: float | None


def serve(
    workload: Workload,
    caches: Sequence[Cache],
    topology: HardwareTopology,
    context: int,
    *,
    precision: str = "bfloat16",
    price_per_hour: float | None = None,
) -> Serving:
    """The devices and the batch that make a token cheap, every sequence ``context`` tokens long.

    ``caches``: one a layer. ``precision``: of weights and products; attention runs in bfloat16. Experts are spread over
    the devices, each of which holds the rest and as many sequences as the others; a dense model is cut over all of
    them, and leaves its domain only where it must. ``price_per_hour``: of one device.
    Refuses a model that does not fit ``MOST_DOMAINS`` domains with one sequence (of each device).
    """
    if len(caches) != len(workload.layers):
        raise Refusal(f"{len(caches)} caches for {len(workload.layers)} layers: give one a layer")
    roofline = _Roofline(workload, caches, topology, context, precision)
    sizes = [devices for devices in _sizes(topology, roofline.experts) if roofline.most(devices) >= 1]
    if not sizes:
        raise Refusal(
            f"{topology.name}: {MOST_DOMAINS} domains of {topology.domain.size} do not hold the weights and one "
            f"sequence of {context} tokens: serve a smaller model, a shorter context or in fewer bytes"
        )
    if not roofline.experts and sizes[0] <= topology.domain.size:
        sizes = [devices for devices in sizes if devices <= topology.domain.size]
    costs = {devices: roofline.cost(devices, roofline.most(devices)) for devices in sizes}
    devices = next(devices for devices in sizes if costs[devices] <= FEWER * min(costs.values()))
    most = roofline.most(devices)
    lot = roofline.lot(devices)
    low, high = 0, most // lot  # cost falls with the batch: the smallest that is cheap enough
    while high - low > 1:
        middle = (low + high) // 2
        cheap = roofline.cost(devices, lot * middle) <= ENOUGH * roofline.cost(devices, most)
        low, high = (low, middle) if cheap else (middle, high)
    batch = lot * high
    times = roofline.times(devices, batch)
    bound = max(times, key=lambda name: times[name])
    seconds = 1e6 * roofline.cost(devices, batch)
    price = None if price_per_hour is None else seconds / 3600 * price_per_hour
    return Serving(context, devices, batch, most, times[bound], bound, seconds, price)


def _sizes(topology: HardwareTopology, experts: int) -> list[int]:
    """Numbers of devices for one copy: powers of two in a domain, and up to ``MOST_DOMAINS`` of its sizes in practice.
    Experts share out evenly."""
    powers = {2**power for power in range(topology.domain.size.bit_length())}
    used = topology.domain.practice or (topology.domain.size,)
    found = powers | {size * domains for size in used for domains in range(1, MOST_DOMAINS + 1)}
    return sorted(size for size in found if not experts or experts % size == 0)


class _Roofline:
    """Times of one step of ``batch`` sequences on ``devices``."""

    def __init__(
        self, workload: Workload, caches: Sequence[Cache], topology: HardwareTopology, context: int, precision: str
    ) -> None:
        self.topology, self.width, self.layers = topology, workload.width, len(workload.layers)
        self.bandwidth = topology.known("device.memory_bandwidth")
        self.free = topology.known("device.memory_bytes") - RESERVED_BYTES
        self.peak, attention_peak = topology.peak(precision), topology.peak("bfloat16")
        weight_bytes = WEIGHT_BYTES.get(precision, ACTIVATION_BYTES)
        blocks = [*workload.layers, workload.head]
        operations = [op for block in blocks for op in block.operations if not op.name.startswith("mtp.")]
        self.expert_bytes = weight_bytes * sum(op.parameters for op in operations if "ep" in op.axes)
        shared = sum(op.parameters for op in operations if "ep" not in op.axes)
        # A tied head's weights are counted with the embedding, of which a token reads a row.
        shared += workload.embedding.parameters if workload.tied_embedding else 0
        self.shared_bytes = weight_bytes * shared
        self.embedding_bytes = 0 if workload.tied_embedding else weight_bytes * workload.embedding.parameters
        routed = [exchange for layer in workload.layers for exchange in layer.exchanges if exchange.axis == "ep"]
        self.experts, self.visits = (routed[0].experts, routed[0].visits) if routed else (0, 0)
        self.copy_bytes, self.expert_layers = (routed[0].bytes, len(routed)) if routed else (0.0, 0)
        products = sum(op.forward_flops for op in operations if op.product)
        self.caches = [
            (cache.parts, count * cache.kept_bytes(context), count * cache.moved_bytes(context))
            for cache, count in Counter(caches).items()
        ]
        self.compute_s = products / self.peak + sum(cache.flops(context) for cache in caches) / attention_peak

    def lot(self, devices: int) -> int:
        """Sequences by which a batch grows: one for each device that holds whole sequences."""
        return devices if self.experts else 1

    def most(self, devices: int) -> int:
        """Sequences that fit beside the weights."""
        free = self.free - (self.shared_bytes + self.embedding_bytes) / self._cut(devices) - self.expert_bytes / devices
        return max(0, int(free / self._kept(devices)[0])) * self.lot(devices)

    def times(self, devices: int, batch: int) -> dict[str, float]:
        """Seconds of a step by what it needs: memory, compute, links."""
        met = 1 - (1 - self.visits / self.experts) ** batch if self.experts else 0.0
        weights = self.shared_bytes / self._cut(devices) + met * self.expert_bytes / devices
        read = weights + batch / self.lot(devices) * self._kept(devices)[1]
        return {
            "memory": read / self.bandwidth,
            "compute": batch * self.compute_s / devices,
            "links": self._links_s(devices, batch),
        }

    def cost(self, devices: int, batch: int) -> float:
        """Device-seconds of a token."""
        return max(self.times(devices, batch).values()) * devices / batch

    def _cut(self, devices: int) -> int:
        """Parts of the weights that are not experts."""
        return 1 if self.experts else devices

    def _kept(self, devices: int) -> tuple[float, float]:
        """Bytes of a sequence that one device keeps, and that it moves in a step."""
        cuts = [1 if self.experts else min(devices, parts) for parts, _, _ in self.caches]
        kept = sum(kept / cut for cut, (_, kept, _) in zip(cuts, self.caches))
        return kept, sum(moved / cut for cut, (_, _, moved) in zip(cuts, self.caches))

    def _links_s(self, devices: int, batch: int) -> float:
        group = Span(devices, math.ceil(devices / math.ceil(devices / self.topology.domain.size)))
        if not self.experts:
            size = batch * self.width * ACTIVATION_BYTES
            return 2 * self.layers * float(all_reduce_s(size, group, self.topology))
        ways = all_to_all_s(batch / devices, self.copy_bytes, self.visits, self.experts, group, self.topology)
        return 2 * self.expert_layers * float(max(ways))
