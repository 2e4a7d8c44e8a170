"""Tensors of transformers' qwen3_next under Stoker's global names, both ways, bit for bit.

Both sides hold the same rows: transformers packs rows of several of Stoker's tensors into one, head by head, and
spreads the experts of a layer over one tensor each. `Rows` states that once for both directions::

    spec, params = hf.read("Qwen3-Next-80B-A3B-Base", drop=("mtp.",))
    hf.write("exported", spec, params)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.exchange.folder import TensorFolder, read_config, write_folder
from pretrain.exchange.hf_config import TRAINING_ONLY, hf_config, spec_from_hf
from pretrain.spec import Attention, GatedDelta, LayerSpec, ModelSpec, MoE, Parameter
from stoker.errors import Refusal

__all__ = ["export_state", "hf_config", "import_state", "read", "spec_from_hf", "write"]

#: Size of a shard in bytes; the hub asks for files well under 50 GB.
SHARD_BYTES = 5 * 10**9

Tensors = Mapping[str, Tensor] | Mapping[str, np.ndarray]


def read(directory: str | os.PathLike[str], drop: tuple[str, ...] = ()) -> tuple[ModelSpec, Mapping[str, Tensor]]:
    """Spec and parameters (each read when asked for) of a folder with ``config.json`` and safetensors files; see
    `import_state` for `drop` and refusals."""
    spec = spec_from_hf(read_config(directory))
    return spec, import_state(spec, TensorFolder(directory), drop)


def write(
    directory: str | os.PathLike[str], spec: ModelSpec, params: Tensors, shard_bytes: int = SHARD_BYTES, **inert: Any
) -> None:
    """A folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads. `inert`: more keys of
    ``config.json``, such as ``eos_token_id`` and ``max_position_embeddings``."""
    write_folder(directory, hf_config(spec, **inert), export_state(spec, params), shard_bytes)


def import_state(spec: ModelSpec, hf_tensors: Tensors, drop: tuple[str, ...] = ()) -> Mapping[str, Tensor]:
    """``{global name: tensor}`` from qwen3_next tensors by name, in the dtype they have.

    Experts may be one tensor each (files on disk) or packed (``model.state_dict()`` of transformers 5). Tensors whose
    name starts with one of `drop` are left out, such as the multi-token prediction head, ``mtp.``. Router counters and
    bias, which qwen3_next lacks, start at zero. Values are made when asked for, group by group in the mapping's order,
    and may share memory with the source. Refuses missing and unknown names at once, wrong shapes and mixed dtypes of
    packed tensors when they are read.
    """
    hf_config(spec, ignore=TRAINING_ONLY | {"bias_update_rate"})
    parameters = spec.parameters()
    groups = list(_groups(spec, packed_experts=any(name.endswith("mlp.experts.gate_up_proj") for name in hf_tensors)))
    _require_same_names(
        {name for name in hf_tensors if not name.startswith(drop)},
        {name for rows in groups for name in rows.theirs},
        "is config.json the one of these files? drop=('mtp.',) leaves out a multi-token prediction head",
    )
    groups += [Rows((name,), {}) for name, parameter in parameters.items() if not parameter.trained]

    def ours(rows: Rows) -> dict[str, Tensor]:
        if not rows.theirs:
            return {name: _zeros(parameters[name]) for name in rows.ours}
        return rows.to_ours(hf_tensors, parameters)

    return _Converted({name: rows for rows in groups for name in rows.ours}, ours)


def export_state(spec: ModelSpec, params: Tensors) -> Mapping[str, Tensor]:
    """``{qwen3_next name: tensor}``, experts one tensor each as in published files; the inverse of `import_state`.

    Router counters, which qwen3_next lacks, are left out. Refuses a spec that qwen3_next cannot state (a router bias,
    for one), missing and unknown names, wrong shapes, and packing tensors of different dtype.
    """
    hf_config(spec)
    parameters = spec.parameters()
    state = {name for name, parameter in parameters.items() if not parameter.trained}
    _require_same_names(params.keys() - state, parameters.keys() - state, "are they the parameters of this spec?")
    return _Converted(
        {name: rows for rows in _groups(spec) for name in rows.theirs},
        lambda rows: rows.to_theirs(params, parameters),
    )


@dataclass(frozen=True)
class Rows:
    """Tensors of Stoker and of transformers that hold the same rows (a row is the last dim).

    `theirs` (name -> shape), one after another, are `units` equal blocks; each block holds its share of the rows of
    every tensor of `ours` in turn. With 2 heads, query and gate: ``q0 gate0 q1 gate1`` is ``ours=(q, gate), units=2``.
    """

    ours: tuple[str, ...]
    theirs: Mapping[str, tuple[int, ...]]
    units: int = 1

    def to_ours(self, source: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
        shapes = {name: parameters[name].shape for name in self.ours}
        parts = [part.reshape(-1, part.shape[-1]) for part in _take(source, self.theirs)]
        blocks = _cat(parts, dim=0).reshape(self.units, -1, parts[0].shape[-1])
        pieces = blocks.split([_num_rows(shape) // self.units for shape in shapes.values()], dim=1)
        return {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}

    def to_theirs(self, source: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
        shapes = {name: parameters[name].shape for name in self.ours}
        parts = [
            part.reshape(self.units, _num_rows(part.shape) // self.units, part.shape[-1])
            for part in _take(source, shapes)
        ]
        rows = _cat(parts, dim=1).reshape(-1, parts[0].shape[-1])
        pieces = rows.split([_num_rows(shape) for shape in self.theirs.values()])
        return {name: piece.reshape(self.theirs[name]) for name, piece in zip(self.theirs, pieces, strict=True)}


def _groups(spec: ModelSpec, packed_experts: bool = False) -> Iterator[Rows]:
    """Every trained tensor of a model, grouped with its counterparts, in order of layers."""
    D = spec.width
    yield Rows(("embed.weight",), {"model.embed_tokens.weight": (spec.vocab_size, D)})
    for index, layer in enumerate(spec.layers):
        yield from _layer(layer, D, f"layers.{index}.", f"model.layers.{index}.", packed_experts)
    yield Rows(("final_norm.weight",), {"model.norm.weight": (D,)})
    if not spec.tied_embedding:
        yield Rows(("head.weight",), {"lm_head.weight": (spec.vocab_size, D)})


def _layer(layer: LayerSpec, D: int, ours: str, theirs: str, packed_experts: bool) -> Iterator[Rows]:
    def rows(our: str, their: str, *shape: int, units: int = 1) -> Rows:
        branch, *names = our.split()
        return Rows(tuple(f"{ours}{branch}.{name}" for name in names), {theirs + their: shape}, units)

    mixer, ffn = layer.mixer, layer.ffn
    yield rows("mixer norm.weight", "input_layernorm.weight", D)
    if isinstance(mixer, GatedDelta):
        HK, HV = mixer.num_qk_heads * mixer.key_dim, mixer.num_v_heads * mixer.value_dim
        num_v, groups = mixer.num_v_heads, mixer.num_qk_heads
        linear = "linear_attn."
        packed = "mixer q.weight k.weight v.weight z.weight"
        yield rows(packed, linear + "in_proj_qkvz.weight", 2 * HK + 2 * HV, D, units=groups)
        yield rows("mixer b.weight a.weight", linear + "in_proj_ba.weight", 2 * num_v, D, units=groups)
        convs = "mixer q_conv.weight k_conv.weight v_conv.weight"
        yield rows(convs, linear + "conv1d.weight", 2 * HK + HV, 1, mixer.conv_width)
        yield rows("mixer A_log", linear + "A_log", num_v)
        yield rows("mixer dt_bias", linear + "dt_bias", num_v)
        yield rows("mixer out_norm.weight", linear + "norm.weight", mixer.value_dim)
        yield rows("mixer o.weight", linear + "out_proj.weight", D, HV)
    else:
        assert isinstance(mixer, Attention)
        H, dim, GK = mixer.num_heads, mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        yield rows("mixer q.weight gate.weight", "self_attn.q_proj.weight", 2 * H * dim, D, units=H)
        yield rows("mixer k.weight", "self_attn.k_proj.weight", GK, D)
        yield rows("mixer v.weight", "self_attn.v_proj.weight", GK, D)
        yield rows("mixer q_norm.weight", "self_attn.q_norm.weight", dim)
        yield rows("mixer k_norm.weight", "self_attn.k_norm.weight", dim)
        yield rows("mixer o.weight", "self_attn.o_proj.weight", D, H * dim)

    def swiglu(our: str, their: str, hidden: int) -> Iterator[Rows]:
        for field, *shape in (("gate", hidden, D), ("up", hidden, D), ("down", D, hidden)):
            yield rows(f"ffn {our}{field}.weight", f"{their}{field}_proj.weight", *shape)

    yield rows("ffn norm.weight", "post_attention_layernorm.weight", D)
    if not isinstance(ffn, MoE):
        yield from swiglu("", "mlp.", ffn.hidden)
        return
    yield rows("ffn router.weight", "mlp.gate.weight", ffn.num_experts, D)
    yield from swiglu("shared.", "mlp.shared_expert.", ffn.shared_hidden or 0)
    yield rows("ffn shared.router.weight", "mlp.shared_expert_gate.weight", 1, D)
    E, F = ffn.num_experts, ffn.hidden
    if packed_experts:
        packed = "ffn experts.gate.weight experts.up.weight"
        yield rows(packed, "mlp.experts.gate_up_proj", E, 2 * F, D, units=E)
        yield rows("ffn experts.down.weight", "mlp.experts.down_proj", E, D, F)
        return
    for field, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        names = [f"{theirs}mlp.experts.{e}.{field}_proj.weight" for e in range(E)]
        yield Rows((f"{ours}ffn.experts.{field}.weight",), dict.fromkeys(names, shape))


class _Converted(Mapping[str, Tensor]):
    """Tensors by name, made group by group when asked for; the last group made is kept."""

    def __init__(self, groups: Mapping[str, Rows], make: Callable[[Rows], dict[str, Tensor]]) -> None:
        self._groups, self._make = groups, make
        self._last: tuple[Rows | None, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        rows = self._groups[name]
        if self._last[0] is not rows:
            self._last = (None, {})
            self._last = (rows, self._make(rows))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


def _take(source: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    parts = [torch.as_tensor(source[name]) for name in shapes]
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        if tuple(part.shape) != shape:
            raise Refusal(f"tensor {name!r} has shape {tuple(part.shape)}, but the configuration gives {shape}")
    dtypes = {name: str(part.dtype) for name, part in zip(shapes, parts, strict=True)}
    if len(set(dtypes.values())) > 1:
        raise Refusal(f"tensors that are packed into one have different dtypes: {dtypes}; convert them to one dtype")
    return parts


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _num_rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def _zeros(parameter: Parameter) -> Tensor:
    return torch.zeros(parameter.shape, dtype=torch.int64 if parameter.dtype == "int64" else torch.float32)


def _require_same_names(have: Collection[str], want: Collection[str], advice: str) -> None:
    missing, unknown = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    if missing or unknown:
        raise Refusal(f"tensors missing: {_some(missing)}; tensors unknown: {_some(unknown)}; {advice}")


def _some(names: list[str], limit: int = 5) -> str:
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "none"
