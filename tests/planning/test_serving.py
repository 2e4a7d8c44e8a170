"""The decode roofline against hand arithmetic, published cache sizes and brute force over batches."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.design.serving import (
    ENOUGH,
    FEWER,
    RESERVED_BYTES,
    Cache,
    Serving,
    delta_state,
    grouped_query,
    latent,
    serve,
)
from parallel.planning.models.mixers import attention, latent_attention
from parallel.planning.models.operations import Stream, assemble, layer, mlp, moe
from parallel.planning.topology import HardwareTopology, load_hardware
from parallel.planning.workload import Workload
from stoker.errors import Refusal

Model = tuple[Workload, tuple[Cache, ...]]


def llama(width: int, layers: int, heads: int, hidden: int, kv_heads: int = 8) -> Model:
    stream = Stream(width, 8192)
    block = layer(stream, attention(stream, heads, kv_heads, 128), mlp(stream, hidden))
    return assemble(stream, 128_256, (block,) * layers), (grouped_query(heads, kv_heads, 128),) * layers


def deepseek_v3() -> Model:
    stream = Stream(7168, 4096)
    mixer = latent_attention(stream, 128, q_lora=1536, kv_lora=512, nope=128, rope=64, value_dim=128)
    dense = layer(stream, mixer, mlp(stream, 18432))
    sparse = layer(stream, mixer, moe(stream, 256, 8, 2048, shared=2048))
    return assemble(stream, 129_280, (dense,) * 3 + (sparse,) * 58), (latent(128, 512, 64),) * 61


LLAMA_8B, LLAMA_70B, LLAMA_405B = (
    llama(4096, 32, 32, 14336),
    llama(8192, 80, 64, 28672),
    llama(16384, 126, 128, 53248),
)
DEEPSEEK_V3 = deepseek_v3()


def one_device(name: str, memory_bytes: float | None = None) -> HardwareTopology:
    topology = load_hardware(name)
    domain = replace(topology.domain, size=1, per_host=1, practice=(1,))
    device = replace(topology.device, memory_bytes=memory_bytes or topology.device.memory_bytes)
    return replace(topology, domain=domain, spares=0, device=device)


@pytest.mark.parametrize(
    ("caches", "kilobytes"),
    [
        (DEEPSEEK_V3[1], 70.272),
        (LLAMA_405B[1], 516.096),
        ((grouped_query(64, 8, 128),) * 80, 327.680),  # Qwen-2.5 72B
    ],
)
def test_bytes_of_a_cached_token_are_those_of_the_deepseek_paper(caches: tuple[Cache, ...], kilobytes: float) -> None:
    """arXiv 2505.09343, table 1: KV cache a token in bfloat16."""
    assert sum(cache.kept_bytes(1) for cache in caches) == 1e3 * kilobytes


def test_a_state_costs_the_same_at_any_length_and_a_cache_grows_with_it() -> None:
    state, cache, window = delta_state(32, 128, 128), grouped_query(32, 8, 128), grouped_query(32, 8, 128, window=1000)
    assert state.kept_bytes(10) == state.kept_bytes(10**6) == 32 * 128 * 128 * 4
    assert state.moved_bytes(10) == 2 * state.kept_bytes(10)
    assert cache.kept_bytes(10**6) == cache.moved_bytes(10**6) == 10**6 * 2 * 8 * 128 * 2
    assert window.kept_bytes(10**6) == window.kept_bytes(1000) == cache.kept_bytes(1000)


def test_a_dense_step_is_hand_arithmetic_on_one_device() -> None:
    topology = one_device("h100")
    workload, caches = LLAMA_8B
    found = serve(workload, caches, topology, 8192)
    embedding = head = 128_256 * 4096
    layers = workload.parameters - embedding - head - 4096
    free = topology.device.memory_bytes - RESERVED_BYTES - 2 * workload.parameters  # type: ignore[operator]
    cached = 8192 * 32 * 2 * 8 * 128 * 2
    assert found.most == int(free / cached)
    read = 2 * (layers + head + 4096) + found.batch * cached
    products = 2 * (layers - 32 * 2 * 4096 + head)  # two norms a layer multiply nothing
    scores = 4 * 32 * 128 * 8192 * 32
    compute = found.batch * (products + scores) / topology.peak("bfloat16")
    assert found.bound == "memory"
    assert found.token_s == pytest.approx(read / 3.35e12, rel=1e-9)
    assert compute < found.token_s
    assert found.device_seconds == pytest.approx(1e6 * found.token_s / found.batch)


def test_products_bound_what_has_hardly_a_cache() -> None:
    """A model of states alone: the batch stops growing once the products take as long as the weights."""
    workload, _ = LLAMA_8B
    found = serve(workload, (delta_state(1, 64, 64),) * 32, one_device("h100"), 8192)
    head = 128_256 * 4096
    products = 2 * (workload.parameters - head - 4096 - 64 * 4096)  # the embedding is looked up, norms are no product
    assert 4 * found.batch < found.most
    assert 1 <= found.device_seconds / (1e6 * products / 989e12) <= ENOUGH


@given(context=st.sampled_from([1024, 8192, 32_768, 131_072]), layers=st.integers(1, 32))
@settings(max_examples=15, deadline=None)
def test_batch_is_the_smallest_that_is_as_cheap_as_a_full_memory(context: int, layers: int) -> None:
    """Against a scan of all batches, for ``layers`` of softmax attention among states."""
    topology = one_device("a100-80gb")
    workload, softmax = LLAMA_8B
    caches = softmax[:layers] + (delta_state(32, 128, 128),) * (32 - layers)
    found = serve(workload, caches, topology, context)
    embedding = 128_256 * 4096
    weights = 2 * (workload.parameters - embedding)
    moved = sum(cache.moved_bytes(context) for cache in caches)
    flops = 2 * (workload.parameters - embedding - 65 * 4096) + sum(cache.flops(context) for cache in caches)
    bandwidth, peak = topology.known("device.memory_bandwidth"), topology.peak("bfloat16")

    def cost(batch: int) -> float:
        return max((weights + batch * moved) / bandwidth, batch * flops / peak) / batch

    smallest = next(b for b in range(1, found.most + 1) if cost(b) <= ENOUGH * cost(found.most))
    assert found.batch == smallest
    assert found.device_seconds == pytest.approx(1e6 * cost(smallest), rel=1e-9)


def test_linear_layers_are_what_long_context_is_cheap_with() -> None:
    topology = load_hardware("h200")
    workload, softmax = LLAMA_70B
    hybrid = ((delta_state(64, 128, 128),) * 3 + softmax[:1]) * 20

    def ratio(context: int) -> float:
        return (
            serve(workload, softmax, topology, context).device_seconds
            / serve(workload, hybrid, topology, context).device_seconds
        )

    ratios = [ratio(context) for context in (512, 8192, 131_072)]
    assert ratios == sorted(ratios)
    assert ratios[0] < 1.2  # a state of 64 matrices is worth a thousand cached tokens
    assert 3.5 < ratios[-1] < 4  # a quarter of the caches, and states


def test_a_dense_model_is_cut_as_it_is_served_in_practice() -> None:
    """Tensor parallelism over the eight heads of keys and values; more ranks would hold copies of them."""
    for name in ("h100", "h200", "gb200-nvl72", "mi300x"):
        assert serve(*LLAMA_70B, load_hardware(name), 8192, precision="fp8").devices in (4, 8)


def test_deepseek_v3_spreads_its_experts_over_a_rack_and_over_several_boards() -> None:
    """DeepSeek decodes on 320 H800 (arXiv 2412.19437, section 3.4); a rack holds all experts in one domain."""
    rack = serve(*DEEPSEEK_V3, load_hardware("gb200-nvl72"), 8192, precision="fp8")
    boards = serve(*DEEPSEEK_V3, load_hardware("h100"), 8192, precision="fp8")
    assert 16 <= rack.devices <= 64
    assert boards.devices > 8
    assert boards.batch % boards.devices == rack.batch % rack.devices == 0  # as many sequences on each


def test_the_network_bounds_experts_that_leave_their_domain() -> None:
    topology = load_hardware("h100")
    slow = replace(topology, network=replace(topology.network, bandwidth=1e9))
    assert serve(*DEEPSEEK_V3, slow, 4096, precision="fp8").bound == "links"
    fast = serve(*DEEPSEEK_V3, topology, 4096, precision="fp8")
    assert fast.device_seconds < serve(*DEEPSEEK_V3, slow, 4096, precision="fp8").device_seconds


@given(
    model=st.sampled_from([LLAMA_8B, LLAMA_70B, DEEPSEEK_V3]),
    context=st.sampled_from([1, 500, 4096, 65_536]),
    field=st.sampled_from(["memory_bytes", "memory_bandwidth"]),
    factor=st.sampled_from([1.1, 2.0, 10.0]),
)
@settings(max_examples=40, deadline=None)
def test_better_hardware_never_serves_dearer(model: Model, context: int, field: str, factor: float) -> None:
    topology = load_hardware("h200")
    changed: dict[str, Any] = {field: factor * topology.known(f"device.{field}")}
    better = replace(topology, device=replace(topology.device, **changed))
    plain, improved = (serve(*model, machine, context, precision="fp8") for machine in (topology, better))
    assert improved.device_seconds <= ENOUGH * FEWER * plain.device_seconds


def test_longer_contexts_are_never_cheaper() -> None:
    costs = [serve(*LLAMA_70B, load_hardware("h200"), 2**power).device_seconds for power in range(8, 18)]
    assert all(longer >= shorter / FEWER for shorter, longer in pairwise(costs))
    assert costs[-1] > 20 * costs[0]


def test_a_lone_token_meets_only_the_experts_it_visits() -> None:
    """One sequence fits, so a step reads eight of 256 experts and everything else."""
    workload, caches = DEEPSEEK_V3
    big = Cache(1, token_bytes=1e9)
    topology = one_device("h100", memory_bytes=1.5e12)
    alone = replace(topology, network=replace(topology.network, bandwidth=1.0))
    found = serve(workload, (big, *caches[1:]), alone, 600, precision="fp8")
    assert (found.devices, found.batch, found.most) == (1, 1, 1)
    read = workload.active_parameters - workload.embedding.parameters + 600 * (1e9 + 60 * 576 * 2)
    assert found.token_s == pytest.approx(read / 3.35e12, rel=1e-3)


def test_cost_is_the_price_of_the_gpu_time_and_unknown_without_a_price() -> None:
    topology = load_hardware("h100")
    priced = serve(*LLAMA_8B, topology, 8192, price_per_hour=2.5)
    plain = serve(*LLAMA_8B, topology, 8192)
    assert plain.cost is None
    assert priced.cost == pytest.approx(plain.device_seconds / 3600 * 2.5)
    assert replace(priced, cost=None) == plain


def test_fewer_bytes_a_weight_are_cheaper() -> None:
    topology = load_hardware("gb300-nvl72")
    costs = [serve(*DEEPSEEK_V3, topology, 4096, precision=p).device_seconds for p in ("bfloat16", "fp8", "nvfp4")]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 3


def test_what_fits_nowhere_is_refused_with_what_to_do() -> None:
    with pytest.raises(Refusal, match="4 domains of 8 do not hold the weights and one sequence of 100000000 tokens"):
        serve(*LLAMA_405B, load_hardware("h100"), 10**8)
    with pytest.raises(Refusal, match="3 caches for 32 layers"):
        serve(LLAMA_8B[0], LLAMA_8B[1][:3], load_hardware("h100"), 4096)
    with pytest.raises(Refusal, match=r"no peak .*nvfp4"):
        serve(*LLAMA_8B, load_hardware("h100"), 4096, precision="nvfp4")


def test_a_dense_model_leaves_its_board_only_where_it_must() -> None:
    found: Serving = serve(*LLAMA_405B, load_hardware("h100"), 8192)  # 810 GB of weights, 8 x 80 GB
    assert found.devices > 8
    assert math.isfinite(found.device_seconds)
    assert serve(*LLAMA_405B, load_hardware("h200"), 8192).devices == 8
