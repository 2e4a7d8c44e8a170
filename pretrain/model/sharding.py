"""Where each global tensor lies under a plan: ``{global name: Layout}``. Torch-free.

Tensor parallelism cuts heads, feed-forward widths and the vocabulary; expert parallelism cuts the experts of a layer;
what is left is replicated. A replicated weight that each tensor rank applies to its own tokens or its own heads has a
gradient that is a partial sum over ``tp``.
"""

from __future__ import annotations

from parallel.planning.layout import Family, Layout, Split
from parallel.planning.plan import ParallelPlan
from pretrain.spec import Attention, FeedForward, Kda, Mixer, ModelSpec, MoE


def layouts(spec: ModelSpec, plan: ParallelPlan) -> dict[str, Layout]:
    """The Layout of every tensor of ``spec.parameters()``."""
    by_name = {}
    for name, parameter in spec.parameters().items():
        splits, partial, family = _placement(name, spec, plan)
        by_name[name] = Layout(
            shape=parameter.shape,
            splits=tuple(split for split in splits if split.parts > 1),
            family=family,
            stages=stages_of(name, spec, plan),
            partial=partial if plan.tp > 1 else (),
        )
    return by_name


def chunk_of(name: str, spec: ModelSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """The model chunks (of pp * vpp, in order of depth) that hold a tensor."""
    last = plan.pp * plan.vpp - 1
    if name == "embed.weight":
        return tuple(dict.fromkeys((0, last))) if spec.tied_embedding else (0,)
    if name.startswith("layers."):
        index = int(name.split(".")[1])
        return next((chunk,) for chunk, layers in enumerate(plan.stages) if index in layers)
    return (last,)


def stages_of(name: str, spec: ModelSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """The pipeline coordinates that hold a tensor."""
    return tuple(dict.fromkeys(chunk % plan.pp for chunk in chunk_of(name, spec, plan)))


def _placement(name: str, spec: ModelSpec, plan: ParallelPlan) -> tuple[list[Split], tuple[str, ...], Family]:
    tp = plan.tp
    if name in ("embed.weight", "head.weight"):
        return [Split(0, "tp", tp)], (), "dense"
    # A norm of the residual stream sees all tokens on every rank, or with sequence parallelism its own tokens only.
    stream_partial = ("tp",) if plan.sequence_parallel else ()
    if name.endswith(("mixer.norm.weight", "ffn.norm.weight")) or name == "final_norm.weight":
        return [], stream_partial, "dense"
    _, index, branch, field = name.split(".", 3)
    layer = spec.layers[int(index)]
    return _mixer(field, layer.mixer, tp) if branch == "mixer" else _ffn(field, layer.ffn, plan)


def _mixer(field: str, mixer: Mixer, tp: int) -> tuple[list[Split], tuple[str, ...], Family]:
    stem = field.split(".")[0]
    if stem in ("q_norm", "k_norm", "out_norm", "f_a", "g_a"):
        return [], ("tp",), "dense"  # one weight, whose output each rank uses for its own heads
    if isinstance(mixer, Attention):
        units = dict.fromkeys(("q", "gate", "k", "v", "o"), mixer.head_dim)
    else:
        K, V = mixer.key_dim, mixer.value_dim
        units = {"q": K, "k": K, "v": V, "o": V, "q_conv": K, "k_conv": K, "v_conv": V}
        units |= {"f_b": K, "dt_bias": K, "g_b": V} if isinstance(mixer, Kda) else {"z": V}
    dim = 1 if stem == "o" else 0
    return [Split(dim, "tp", tp, unit=units.get(stem, 1))], (), "dense"


def _ffn(field: str, ffn: FeedForward, plan: ParallelPlan) -> tuple[list[Split], tuple[str, ...], Family]:
    if isinstance(ffn, MoE):
        if field.startswith("experts."):
            inner = Split(2 if "down" in field else 1, "etp", plan.etp)
            return [Split(0, "ep", plan.ep), inner], (), "expert"
        if field in ("router.weight", "shared.router.weight"):
            return [], ("tp",), "dense"  # each tensor rank routes its own tokens
        if field.startswith("router."):
            return [], (), "dense"
    return [Split(1 if "down" in field else 0, "tp", plan.tp)], (), "dense"
