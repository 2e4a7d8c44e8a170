"""Tensors that Stoker and transformers hold under other names, cut or joined in another way: the same values in order.

`Packing` states it once for both directions; `Converted` makes the tensors of a side when they are asked for. The rest
says what the decoders of transformers have in common. Shapes: ``D`` model width, ``E`` experts, ``F`` inner width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.spec import LayerSpec, ModelSpec, MoE, Parameter
from stoker.errors import Refusal

Tensors = Mapping[str, Tensor] | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Packing:
    """Tensors of Stoker and of transformers that hold the same values.

    `theirs` (name -> shape), one after another, are `units` equal blocks; each block holds its share of every tensor of
    `ours` in turn. With 2 heads, query and gate: ``q0 gate0 q1 gate1`` is ``ours=(q, gate), units=2``.
    """

    ours: tuple[str, ...]
    theirs: Mapping[str, tuple[int, ...]]
    units: int = 1

    def to_ours(self, source: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
        shapes = {name: parameters[name].shape for name in self.ours}
        blocks = _cat([part.reshape(-1) for part in _take(source, self.theirs)], dim=0).reshape(self.units, -1)
        pieces = blocks.split([math.prod(shape) // self.units for shape in shapes.values()], dim=1)
        return {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}

    def to_theirs(self, source: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
        shapes = {name: parameters[name].shape for name in self.ours}
        values = _cat([part.reshape(self.units, -1) for part in _take(source, shapes)], dim=1).reshape(-1)
        pieces = values.split([math.prod(shape) for shape in self.theirs.values()])
        return {name: piece.reshape(self.theirs[name]) for name, piece in zip(self.theirs, pieces, strict=True)}


class Converted(Mapping[str, Tensor]):
    """Tensors by name, made packing by packing when asked for; the last packing made is kept."""

    def __init__(self, packings: Mapping[str, Packing], make: Callable[[Packing], dict[str, Tensor]]) -> None:
        self._packings, self._make = packings, make
        self._last: tuple[Packing | None, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        packing = self._packings[name]
        if self._last[0] is not packing:
            self._last = (None, {})
            self._last = (packing, self._make(packing))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packings)

    def __len__(self) -> int:
        return len(self._packings)


@dataclass(frozen=True)
class Prefixes:
    """What the names of one layer begin with on either side. Called with what follows (ours: one name or several, with
    spaces between) and their shape, it gives a packing."""

    ours: str
    theirs: str

    def __call__(self, ours: str, theirs: str, *shape: int, units: int = 1) -> Packing:
        return Packing(tuple(self.ours + name for name in ours.split()), {self.theirs + theirs: shape}, units)


def decoder(spec: ModelSpec, branches: Callable[[LayerSpec, Prefixes], Iterator[Packing]]) -> Iterator[Packing]:
    """Every trained tensor of a model, in order of layers; `branches` gives those of a layer but its two norms."""
    D = spec.width
    yield Packing(("embed.weight",), {"model.embed_tokens.weight": (spec.vocab_size, D)})
    for index, layer in enumerate(spec.layers):
        names = Prefixes(f"layers.{index}.", f"model.layers.{index}.")
        yield names("mixer.norm.weight", "input_layernorm.weight", D)
        yield names("ffn.norm.weight", "post_attention_layernorm.weight", D)
        yield from branches(layer, names)
    yield Packing(("final_norm.weight",), {"model.norm.weight": (D,)})
    if not spec.tied_embedding:
        yield Packing(("head.weight",), {"lm_head.weight": (spec.vocab_size, D)})


def swiglu(names: Prefixes, ours: str, theirs: str, hidden: int, D: int) -> Iterator[Packing]:
    for field, *shape in (("gate", hidden, D), ("up", hidden, D), ("down", D, hidden)):
        yield names(f"{ours}{field}.weight", f"{theirs}{field}_proj.weight", *shape)


def experts(names: Prefixes, theirs: str, moe: MoE, D: int, gate: str, up: str, down: str) -> Iterator[Packing]:
    """The routed experts as files have them: one tensor for each expert and projection, named as given."""
    F = moe.hidden
    for field, their, shape in (("gate", gate, (F, D)), ("up", up, (F, D)), ("down", down, (D, F))):
        each = [f"{names.theirs}{theirs}experts.{expert}.{their}.weight" for expert in range(moe.num_experts)]
        yield Packing((f"{names.ours}ffn.experts.{field}.weight",), dict.fromkeys(each, shape))


def packed_experts(names: Prefixes, theirs: str, moe: MoE, D: int) -> Iterator[Packing]:
    """The routed experts as the modules of transformers 5 have them: two tensors for all."""
    E, F, inner = moe.num_experts, moe.hidden, "ffn.experts.gate.weight ffn.experts.up.weight"
    yield names(inner, f"{theirs}experts.gate_up_proj", E, 2 * F, D, units=E)
    yield names("ffn.experts.down.weight", f"{theirs}experts.down_proj", E, D, F)


def require_same_names(have: Collection[str], want: Collection[str], advice: str) -> None:
    """Raise Refusal with the names that are missing and those that are unknown."""
    missing, unknown = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    if missing or unknown:
        raise Refusal(f"tensors missing: {_some(missing)}; tensors unknown: {_some(unknown)}; {advice}")


def _some(names: list[str], limit: int = 5) -> str:
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "none"


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
