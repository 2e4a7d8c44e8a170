"""Models by name: what a model's name says of its layers, and the workload that they make. No torch.

    entry = architecture_of("Llama 3.1 70B")
    workload = workload_from(entry, seq_len=8192)

``architectures.yaml`` holds the entries, each with its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from parallel.planning.models import mixers
from parallel.planning.models.operations import Part, Stream, assemble, embedding, head, layer, mlp, moe, with_mtp
from parallel.planning.workload import LayerWorkload, Workload
from stoker.errors import Refusal
from stoker.formats import require

FILE = Path(__file__).with_name("architectures.yaml")

#: Sizes by name, hashable.
Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Architecture:
    """A model's shape, or as much of it as a name says; the head of ``architectures.yaml`` explains the fields."""

    names: tuple[str, ...] = ()
    source: str = ""
    layers: int | None = None
    hidden: int | None = None
    ffn_hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    experts: int | None = None
    topk: int | None = None
    moe_ffn: int | None = None
    vocab: int | None = None
    pattern: str = "A"
    mla: Sizes = ()
    window: Sizes = ()
    mamba: Sizes = ()
    gated_delta: Sizes = ()
    kda: Sizes = ()
    dense_layers: int = 0
    shared: int | None = None
    shared_gate: bool = False
    latent: int | None = None
    biased: bool = False
    node_limit: int | None = None
    activation: str | None = None
    tied: bool | None = None
    mtp: int = 0
    mtp_pattern: str = "A"
    mtp_shared: bool = False
    mtp_not_in: tuple[str, ...] = ()
    qk_norm: bool = False
    output_gate: bool = False
    positions: bool = False
    dropout: bool = False
    vectors: int = 1
    unmodelled: str = ""


@cache
def architectures() -> tuple[Architecture, ...]:
    """Every entry, in order of the file."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    require(content, "architectures", 1, str(FILE))
    return tuple(_entry(entry, content["sources"]) for entry in content["models"])


def _entry(values: dict[str, Any], links: dict[str, str]) -> Architecture:
    source = links.get(values["source"], values["source"])
    pattern = "".join(values.get("pattern", "A"))
    flat = {**values.pop("sizes", {}), **values, "source": source, "pattern": pattern}
    return Architecture(**{key: _frozen(value) for key, value in flat.items()})


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def plain(name: str) -> str:
    """A name without case, spaces, punctuation and the owner before a slash."""
    return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())


@cache
def architecture_of(name: str) -> Architecture | None:
    """The entry of which a name's beginning fits best.

    >>> architecture_of("deepseek v3").dense_layers
    3
    """
    fits = [
        (len(plain(prefix)), index)
        for index, entry in enumerate(architectures())
        for prefix in entry.names
        if plain(name).startswith(plain(prefix))
    ]
    return architectures()[max(fits)[1]] if fits else None


@dataclass(frozen=True)
class Form:
    """How a model is run, where that changes what it costs. ``flash``, ``dropout``: of attention (``mixers``);
    ``lean``: experts' outputs are not kept (``operations.moe``)."""

    element_bytes: int = 2
    flash: bool = True
    dropout: bool = False
    lean: bool = True


@lru_cache(maxsize=512)
def workload_from(entry: Architecture, seq_len: int, form: Form = Form()) -> Workload:
    """The workload of an architecture at windows of ``seq_len``; the same object for the same arguments.

    Refusal naming what is missing, or why the architecture is not modelled.
    """
    if entry.unmodelled:
        raise Refusal(f"{entry.unmodelled} is not modelled")
    return _Builder(entry, form, Stream(_size(entry, "hidden"), seq_len, form.element_bytes, fused=True)).workload()


def _size(entry: Architecture, name: str) -> int:
    value = getattr(entry, name)
    if not value:
        raise Refusal(f"{name} unknown, and the model's name does not say")
    return int(value)


@dataclass(frozen=True)
class _Builder:
    entry: Architecture
    form: Form
    stream: Stream

    def workload(self) -> Workload:
        entry, stream, vocab = self.entry, self.stream, self._size("vocab")
        first = embedding(stream, vocab, positions=entry.positions * stream.seq_len, dropout=self._dropout)
        last = head(stream, vocab, tied=bool(entry.tied), norm_vectors=entry.vectors)
        if entry.mtp:
            extra = [layer(stream, *self._parts(symbol)) for symbol in entry.mtp_pattern]
            last = with_mtp(stream, last, extra, vocab, entry.mtp, shared=entry.mtp_shared)
        return assemble(stream, vocab, self._layers(), tied=bool(entry.tied), ends=(first, last))

    def _layers(self) -> list[LayerWorkload]:
        found: dict[tuple[str, bool, int | None], LayerWorkload] = {}
        blocks = []
        for index in range(self._size("layers")):
            symbol = self.entry.pattern[index % len(self.entry.pattern)]
            key = (symbol, index < self.entry.dense_layers, self._window(index))
            if key not in found:
                found[key] = layer(self.stream, *self._parts(*key))
            blocks.append(found[key])
        return blocks

    def _parts(self, symbol: str, dense: bool = False, window: int | None = None) -> Iterator[Part]:
        """Branches of a layer: one where the pattern is of single branches, a mixer and a feed-forward else."""
        stream, entry = self.stream, self.entry
        if symbol in "A*":
            yield self._attention(window)
        elif symbol == "M":
            yield mixers.mamba2(stream, **dict(entry.mamba))
        elif symbol == "G":
            yield mixers.gated_delta(stream, **dict(entry.gated_delta))
        elif symbol == "K":
            yield mixers.kda(stream, **dict(entry.kda))
        if symbol in "E" or (symbol in "AGK" and entry.experts and not dense):
            yield self._moe()
        elif symbol in "-AGK":
            hidden, gated = self._size("ffn_hidden"), self._gated
            yield mlp(stream, hidden, gated=gated, norm_vectors=entry.vectors, dropout=self._dropout)

    def _attention(self, window: int | None) -> Part:
        stream, entry, heads = self.stream, self.entry, self._size("heads")
        if entry.mla:
            return mixers.latent_attention(stream, heads, **dict(entry.mla))
        return mixers.attention(
            stream,
            heads,
            entry.kv_heads or heads,
            entry.head_dim or stream.width // heads,
            rope=not entry.positions,
            qk_norm=entry.qk_norm,
            output_gate=entry.output_gate,
            window=window,
            flash=self.form.flash,
            dropout=self._dropout,
            norm_vectors=entry.vectors,
        )

    def _moe(self) -> Part:
        entry = self.entry
        return moe(
            self.stream,
            self._size("experts"),
            self._size("topk"),
            self._size("moe_ffn"),
            gated=self._gated,
            latent=entry.latent,
            shared=entry.shared,
            shared_gate=entry.shared_gate,
            keeps_outputs=not self.form.lean,
            biased=entry.biased,
            node_limit=entry.node_limit,
        )

    def _window(self, index: int) -> int | None:
        window = dict(self.entry.window)
        return window["keys"] if window and (index + 1) % window["full_every"] else None

    def _size(self, name: str) -> int:
        return _size(self.entry, name)

    @property
    def _gated(self) -> bool:
        return self.entry.activation in (None, "swiglu")

    @property
    def _dropout(self) -> bool:
        return self.form.dropout or self.entry.dropout
