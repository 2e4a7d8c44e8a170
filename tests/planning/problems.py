"""Models, machines and problems that tests of the planner ask about."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from parallel.planning.models.mixers import attention, gated_delta, latent_attention
from parallel.planning.models.operations import Stream, assemble, layer, mlp, moe
from parallel.planning.search.problem import Problem
from parallel.planning.search.scored import remembering_time
from parallel.planning.timing.calibration import Calibration, priors
from parallel.planning.topology import HardwareTopology, load_hardware
from parallel.planning.workload import Workload
from pretrain.config import load
from pretrain.workload import workload_of

PRESETS = ("demo", "tiny-dense", "hybrid-1b", "hybrid-moe-30b-a3b", "kda-moe-48b-a3b")

#: What is believed before any fit: these tests are about the search, whatever the constants are.
CALIBRATION = Calibration(priors(), {"dense": 1.02, "moe": 1.05}, {})
time_of = remembering_time(CALIBRATION)


@cache
def dense(layers: int = 8, width: int = 1024, heads: int = 8, seq_len: int = 2048) -> Workload:
    stream = Stream(width, seq_len)
    return assemble(
        stream, 32000, (layer(stream, attention(stream, heads, heads, 128), mlp(stream, 4 * width)),) * layers
    )


@cache
def mixture(layers: int = 6, width: int = 1024, experts: int = 8, hidden: int = 512) -> Workload:
    """Hybrid: one layer of softmax attention to two of the gated delta rule, all with experts."""
    stream = Stream(width, 2048)
    experts_of = moe(stream, experts, 2, hidden)
    linear = layer(stream, gated_delta(stream, 4, 8, 128, 128), experts_of)
    full = layer(stream, attention(stream, 8, 8, 128), experts_of)
    return assemble(stream, 32000, (linear, linear, full) * (layers // 3))


@cache
def deepseek() -> Workload:
    stream = Stream(7168, 4096)
    mixer = latent_attention(stream, 128, q_lora=1536, kv_lora=512, nope=128, rope=64, value_dim=128)
    first, other = (
        layer(stream, mixer, mlp(stream, 18432)),
        layer(stream, mixer, moe(stream, 256, 8, 2048, shared=2048)),
    )
    return assemble(stream, 129280, (first,) * 3 + (other,) * 58)


def machine(name: str = "h100", memory_gb: float | None = None, links: float = 1.0) -> HardwareTopology:
    """A preset with another memory, or with all of its bandwidths scaled."""
    found = load_hardware(name)
    device = replace(found.device, memory_bandwidth=found.known("device.memory_bandwidth") * links)
    if memory_gb is not None:
        device = replace(device, memory_bytes=memory_gb * 1e9)
    return replace(
        found,
        device=device,
        domain=replace(found.domain, bandwidth=found.known("domain.bandwidth") * links),
        network=replace(found.network, bandwidth=found.known("network.bandwidth") * links),
        host_link=replace(found.host_link, bandwidth=found.known("host_link.bandwidth") * links),
    )


@cache
def llama() -> Workload:
    stream = Stream(16384, 8192)
    return assemble(stream, 128256, (layer(stream, attention(stream, 128, 8, 128), mlp(stream, 53248)),) * 126)


@cache
def preset(name: str) -> tuple[Workload, int]:
    config = load(name)
    return workload_of(config.model_spec(), config.data.seq_len, 2), config.train.global_batch


PROBLEMS = {
    "dense, one host, plenty of memory": Problem(dense(), 32, machine(), 8),
    "dense, one host, little memory": Problem(dense(), 32, machine(memory_gb=6.0), 8),
    "dense, three hosts, batch of 48": Problem(dense(9), 48, machine(memory_gb=7.0), 24),
    "dense, uneven layers": Problem(dense(7), 16, machine(memory_gb=5.0), 4),
    "mixture, one host": Problem(mixture(), 32, machine(memory_gb=8.0), 8),
    "mixture, two hosts": Problem(mixture(), 64, machine(memory_gb=6.0), 16),
    "mixture, part of a rack": Problem(mixture(), 64, machine("gb200-nvl72", memory_gb=7.0), 16),
    "dense, what if": Problem(dense(), 32, machine(memory_gb=5.0), 8, what_if=True),
    "mixture, what if": Problem(mixture(3), 8, machine(memory_gb=4.0), 4, what_if=True),
}
