"""Presets are whole runs: each model has the size its name and first lines state, and a layout that can run."""

from __future__ import annotations

import pytest

from pretrain.config import RunConfig, preset
from pretrain.spec import Attention, Dense, GatedDelta, Kda, ModelSpec, MoE


def gated_delta(width: int, qk: int, v: int, dim: int, taps: int = 4) -> int:
    """q, k, v, z and output projections, a and b, convolutions, A_log and dt_bias, gated norm."""
    return width * dim * (2 * qk + 3 * v) + 2 * width * v + taps * dim * (2 * qk + v) + 2 * v + dim


def kda(width: int, heads: int, dim: int, taps: int = 4) -> int:
    """q, k, v and output projections, b, two gates of the head's rank, convolutions, A_log and dt_bias, gated norm."""
    gates = 2 * (width * dim + dim * heads * dim)
    return 4 * width * heads * dim + width * heads + gates + taps * 3 * heads * dim + heads + heads * dim + dim


def attention(width: int, heads: int, kv: int, dim: int, gate: bool) -> int:
    """q, output and gate projections, k and v, the two head norms."""
    return width * dim * heads * (3 if gate else 2) + 2 * width * dim * kv + 2 * dim


def experts(width: int, visited: int, hidden: int) -> int:
    return 3 * width * hidden * visited


def frame(width: int, vocabulary: int, layers: int, tied: bool = False) -> int:
    """Embedding, head, and the norms before each branch and the head."""
    return width * vocabulary * (1 if tied else 2) + width * (2 * layers + 1)


def demo(visited: int) -> int:
    mixers = 4 * gated_delta(128, 2, 4, 32) + 3 * attention(128, 4, 2, 32, gate=True)
    moe = 128 * 8 + experts(128, visited, 96) + experts(128, 1, 96) + 128
    return frame(128, 4096, 7) + mixers + 3 * 128 * 384 + 6 * moe


def tiny_dense(visited: int) -> int:
    return frame(64, 4096, 4) + 4 * (attention(64, 4, 2, 16, gate=False) + 3 * 64 * 176)


def hybrid_1b(visited: int) -> int:
    mixers = 12 * gated_delta(2048, 8, 16, 128) + 4 * attention(2048, 16, 4, 128, gate=True)
    return frame(2048, 100_352, 16, tied=True) + mixers + 16 * 3 * 2048 * 5632


def hybrid_30b(visited: int) -> int:
    mixers = 36 * gated_delta(2048, 16, 32, 128) + 12 * attention(2048, 16, 2, 256, gate=True)
    moe = 2048 * 256 + experts(2048, visited + 1, 384) + 2048
    return frame(2048, 151_936, 48) + mixers + 48 * moe


def hybrid_235b(visited: int) -> int:
    mixers = 69 * gated_delta(4096, 16, 32, 128) + 23 * attention(4096, 32, 4, 256, gate=True)
    moe = 4096 * 128 + experts(4096, visited, 1536) + experts(4096, 1, 512) + 4096
    return frame(4096, 151_936, 92) + mixers + 92 * moe


def kda_48b(visited: int) -> int:
    mixers = 20 * kda(2304, 32, 128) + 7 * attention(2304, 32, 8, 128, gate=False)
    moe = 2304 * 256 + experts(2304, visited + 1, 1024)
    return frame(2304, 163_840, 27) + mixers + 3 * 2304 * 9216 + 26 * moe


PRESETS = {
    # closed form over the experts a token visits; experts held; experts visited; stated total and active; ranks
    "demo": (demo, 8, 2, "3.66 million", "2.34 million", (1, 2)),
    "tiny-dense": (tiny_dense, 0, 0, "0.71 million", "0.71 million", (1, 2)),
    "hybrid-1b": (hybrid_1b, 0, 0, "1.02 billion", "1.02 billion", (8, 64)),
    "hybrid-moe-30b-a3b": (hybrid_30b, 256, 8, "31.3 billion", "3.2 billion", (64, 256)),
    "hybrid-moe-235b-a22b": (hybrid_235b, 128, 8, "231 billion", "22.9 billion", (64, 512)),
    "kda-moe-48b-a3b": (kda_48b, 256, 8, "49.1 billion", "3.4 billion", (64, 256)),
}


def stated(count: int, like: str) -> str:
    """``count`` in the words and digits of ``like``: (1020269440, "1.02 billion") -> "1.02 billion"."""
    digits, unit = like.split()
    decimals = len(digits.partition(".")[2])
    return f"{count / {'million': 1e6, 'billion': 1e9}[unit]:.{decimals}f} {unit}"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_it_states(name: str, presets_text: dict[str, str]) -> None:
    count, held, visited, total, active, _ = PRESETS[name]
    model = preset(name).model_spec()
    assert model.num_parameters == count(held)
    assert active_parameters(model) == count(visited)
    assert stated(count(held), total) == total and stated(count(visited), active) == active
    comment = presets_text[name].split("\nrun:")[0]
    assert total in comment and (active in comment or active == total)


def active_parameters(model: ModelSpec) -> int:
    """Parameters that a token meets: all but the experts that it does not visit."""
    idle = (
        layer.ffn.num_experts - layer.ffn.top_k if isinstance(layer.ffn, MoE) else 0 for layer in model.layers
    )  # fmt: skip
    return model.num_parameters - sum(
        n * 3 * model.width * layer.ffn.hidden for n, layer in zip(idle, model.layers, strict=True)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_a_layout_on_the_ranks_it_is_meant_for(name: str) -> None:
    config = preset(name)
    for ranks in PRESETS[name][-1]:
        plan = config.plan(ranks, announce=lambda text: None)
        assert plan.dp * plan.num_micro_batches * plan.micro_batch == config.train.global_batch


def test_the_demo_preset_also_runs_under_every_model_parallel_axis_of_two_ranks() -> None:
    from pretrain.config import load

    for overrides in (["parallel.ep=2"], ["parallel.pp=2"], ["parallel.tp=2", "parallel.sequence_parallel=true"]):
        load("demo", overrides).plan(2)


def test_the_demo_preset_has_every_kind_of_layer_and_every_feature() -> None:
    model = preset("demo").model_spec()
    mixers, feeds = {type(layer.mixer) for layer in model.layers}, {type(layer.ffn) for layer in model.layers}
    assert mixers == {GatedDelta, Attention} and feeds == {Dense, MoE}
    for layer in model.layers:
        match layer.mixer:
            case GatedDelta() as delta:
                assert delta.num_v_heads > delta.num_qk_heads
            case Attention() as softmax:
                assert softmax.qk_norm and softmax.output_gate
                assert softmax.num_heads > softmax.num_kv_heads and 0 < softmax.rope_fraction < 1
        if isinstance(layer.ffn, MoE):
            assert layer.ffn.shared_hidden and layer.ffn.shared_gate and layer.ffn.bias_update_rate


@pytest.mark.parametrize("name", ["hybrid-1b", "hybrid-moe-30b-a3b", "hybrid-moe-235b-a22b"])
def test_the_large_presets_have_three_gated_delta_layers_to_one_of_attention(name: str) -> None:
    kinds = [type(layer.mixer) for layer in preset(name).model_spec().layers]
    assert kinds == [GatedDelta, GatedDelta, GatedDelta, Attention] * (len(kinds) // 4)


def test_the_kda_preset_has_the_layers_of_kimi_linear_48b() -> None:
    """Full attention in the layers 4, 8, ... 24 and 27, counted from 1; the first feed-forward is dense."""
    layers = preset("kda-moe-48b-a3b").model_spec().layers
    assert [i + 1 for i, layer in enumerate(layers) if isinstance(layer.mixer, Attention)] == [*range(4, 25, 4), 27]
    assert [i + 1 for i, layer in enumerate(layers) if isinstance(layer.ffn, Dense)] == [1]
    assert {type(layer.mixer) for layer in layers} == {Attention, Kda}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reaches_its_peak_and_its_floor(name: str) -> None:
    config: RunConfig = preset(name)
    schedule, steps = config.train.schedule, config.run.steps
    shares = [schedule.multiplier(step, steps) for step in range(0, steps, max(1, steps // 1000))]
    assert max(shares) == 1.0 and schedule.multiplier(steps - 1, steps) < 0.1


@pytest.fixture
def presets_text() -> dict[str, str]:
    from importlib.resources import files

    return {name: (files("pretrain") / "presets" / f"{name}.yaml").read_text() for name in PRESETS}
