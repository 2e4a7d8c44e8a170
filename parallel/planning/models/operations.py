"""Operations of a model from plain numbers: what each costs a token, without knowing any model.

    stream = Stream(width=4096, seq_len=8192)
    block = layer(stream, attention(stream, 32, 8, 128), mlp(stream, 14336))    # attention: mixers.py
    workload = assemble(stream, 128256, (block,) * 32)

Kernels are taken to read their inputs once and to write their outputs once. Names are stable, since recompute modes and
drawings refer to them (``MODULES``): ``mixer.norm`` and ``ffn.norm``; ``attention`` (the core), ``attention.softmax``
(where it is not fused), ``mla_up.*``; ``mlp.*``, ``experts.*`` and ``shared.*``, each with ``activation``; ``router``,
``dispatch``, ``combine``; ``mtp.*`` in the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from parallel.planning.workload import Divisor, Exchange, LayerWorkload, Operation, Product, Workload

FLOAT32_BYTES = 4
Axes = tuple[str, ...]

#: Operations that each recompute module runs again. Except for ``core_attention``, which keeps its output for the
#: product behind it, what a module no longer keeps is the output of these operations.
MODULES: Mapping[str, tuple[str, ...]] = {
    "core_attention": ("attention", "attention.softmax"),
    "norm": ("mixer.norm", "ffn.norm"),
    "activation": ("mlp.activation", "shared.activation", "experts.activation"),
    "moe_activation": ("experts.activation",),
    "mla_up": ("mla_up.q", "mla_up.kv", "mla_up.rope"),
    "mlp": ("mlp.gate_up", "mlp.gate", "mlp.up", "mlp.activation", "mlp.down"),
    "moe": (
        *("router", "latent.down", "dispatch", "experts.gate_up", "experts.gate", "experts.up", "experts.activation"),
        *(
            "experts.down",
            "experts.bias",
            "combine",
            "latent.up",
            "shared.gate_up",
            "shared.gate",
            "shared.up",
            "shared.activation",
        ),
        *("shared.down", "shared.router", "shared.weighting"),
    ),
    "shared_expert": ("shared.gate_up", "shared.gate", "shared.up", "shared.activation", "shared.down"),
}


@dataclass(frozen=True)
class Part:
    """A mixer or a feed-forward with the norm before it: one residual branch."""

    kind: str
    operations: tuple[Operation, ...]
    divisors: tuple[Divisor, ...] = ()
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class Stream:
    """The residual stream: ``width`` elements a token, of ``element_bytes``, in windows of ``seq_len`` tokens.
    ``fused``: products that read the same input run as one (q, k and v; gate and up)."""

    width: int
    seq_len: int
    element_bytes: int = 2
    fused: bool = False

    @property
    def token_bytes(self) -> int:
        return self.width * self.element_bytes

    def gemm(
        self,
        name: str,
        out: int,
        inner: int,
        cut: Literal["out", "inner"] | None = "out",
        *,
        axes: Axes = ("tp",),
        quantised: bool = True,
    ) -> Operation:
        """A matrix product that keeps its output, which a non-linear operation reads next. ``cut`` None: every rank
        holds all of it."""
        flops, out_bytes = 2 * out * inner, out * self.element_bytes
        return Operation(
            name,
            "gemm",
            axes if cut else (),
            parameters=out * inner,
            active_parameters=out * inner,
            forward_flops=flops,
            backward_flops=2 * flops,
            input_bytes=inner * self.element_bytes,
            output_bytes=out_bytes,
            saved_bytes=out_bytes,
            product=Product(out, inner, cut, quantised=quantised),
        )

    def gemms(self, name: str, rows: Mapping[str, int], inner: int) -> Iterator[Operation]:
        """Products of one input: each by its own name, or ``name`` for all of them where they are fused."""
        if self.fused:
            rows = {name: sum(rows.values())}
        for each, out in rows.items():
            yield self.gemm(each, out, inner)

    def residual(self, name: str, inner: int, out: int | None = None) -> Operation:
        """A product whose output is added to the stream: nobody's backward reads it."""
        return replace(self.gemm(name, out or self.width, inner, "inner"), saved_bytes=0)

    def elementwise(self, name: str, axes: Axes, read: float, written: float, parameters: int = 0) -> Operation:
        """``read`` and ``written`` in elements; keeps its output for the product that reads it."""
        out, size = written * self.element_bytes, parameters
        return Operation(name, "elementwise", axes, size, size, 0, 0, read * self.element_bytes, out, saved_bytes=out)

    def weight(self, name: str, parameters: int) -> Operation:
        """Parameters that every rank holds, of an operation whose work is counted elsewhere."""
        return replace(self.elementwise(name, (), 0, 0, parameters), kernels=0)

    def norm(self, name: str, width: int | None = None, vectors: int = 1) -> Operation:
        """A norm of the stream, or of ``width`` elements: keeps its input, and its output for the products that read
        it. ``vectors``: 1 for a weight (RMSNorm), 2 with a bias (LayerNorm)."""
        width = width or self.width
        op = self.elementwise(name, (), width, width, vectors * width)
        return replace(op, saved_bytes=2 * width * self.element_bytes)

    def dropout(self, name: str) -> Operation:
        """Dropout of a branch's output: keeps a mask of one byte an element."""
        return replace(self.elementwise(name, (), self.width, self.width), saved_bytes=self.width)

    def region(self) -> Exchange:
        """A tensor-parallel region: the stream is gathered before it and scattered behind it."""
        return Exchange("tp", self.token_bytes)


def mlp(
    stream: Stream,
    hidden: int,
    *,
    gated: bool = True,
    norm_vectors: int = 1,
    dropout: bool = False,
) -> Part:
    """Dense feed-forward: SwiGLU, or with ``gated`` false two products around GELU or squared ReLU."""
    ops = [stream.norm("ffn.norm", vectors=norm_vectors), *_feed(stream, "mlp", hidden, stream.width, gated)]
    if dropout:
        ops.append(stream.dropout("ffn.dropout"))
    return Part("dense", tuple(ops), (Divisor("tp", "dense.hidden", hidden),), (stream.region(),))


def _feed(stream: Stream, name: str, hidden: int, width: int, gated: bool) -> Iterator[Operation]:
    if gated:
        yield from stream.gemms(f"{name}.gate_up", {f"{name}.gate": hidden, f"{name}.up": hidden}, width)
    else:
        yield stream.gemm(f"{name}.up", hidden, width)
    yield stream.elementwise(f"{name}.activation", ("tp",), (1 + gated) * hidden, hidden)
    yield stream.residual(f"{name}.down", hidden, width)


def moe(
    stream: Stream,
    experts: int,
    top_k: int,
    hidden: int,
    *,
    gated: bool = True,
    latent: int | None = None,
    shared: int | None = None,
    shared_gate: bool = False,
    keeps_outputs: bool = True,
    biased: bool = False,
    node_limit: int | None = None,
) -> Part:
    """Mixture of ``experts`` of width ``hidden``, a token visiting ``top_k``; a ``shared`` expert of its width for all.

    ``latent``: experts read and write this width, between two products that every rank holds (LatentMoE, arXiv
    2601.18089); copies of a token travel at it. ``keeps_outputs``: the gradient of the router's weights needs the
    experts' outputs (not where weights are applied before the down product: "memory-efficient permutation").
    ``biased``: experts have biases and a clamped activation, which Megatron adds and computes outside the products: two
    more reads and writes of each product's output, and four passes over the activation instead of one.
    ``node_limit``: hosts that a token's experts may lie on (group-limited routing).

    Experts take the tokens as they are cut (by data, context and sequence parallelism): they are no tensor-parallel
    region, a shared expert is one. Where experts are cut over etp, the copies that arrive are gathered over it.
    """
    width = latent or stream.width
    ops = [stream.norm("ffn.norm"), _float32(stream.gemm("router", experts, stream.width, None, quantised=False))]
    ops[-1] = replace(ops[-1], kernels=5)  # product, scores, top-k, weights, histogram
    if latent:
        ops.append(stream.gemm("latent.down", latent, stream.width, None))
    # A token travels to top_k experts and back: that many copies of it are read, kept and written.
    ops.append(replace(stream.elementwise("dispatch", (), width, top_k * width), kernels=4))
    feed = [*_feed(stream, "experts", hidden, width, gated)]
    if biased:
        out = (1 + gated) * hidden + width
        feed = [_repeated(op, 4) if op.name == "experts.activation" else op for op in feed]
        added = stream.elementwise("experts.bias", ("tp",), 2 * out, 2 * out, out)
        feed.append(replace(added, saved_bytes=0, kernels=6))
    ops += (_visited(op, top_k, experts) for op in feed)
    kept = top_k * width * stream.element_bytes if keeps_outputs else 0
    ops.append(replace(stream.elementwise("combine", (), top_k * width, width), saved_bytes=kept, kernels=3))
    if latent:
        ops[-1] = replace(ops[-1], saved_bytes=kept + width * stream.element_bytes)
        ops.append(replace(stream.gemm("latent.up", stream.width, latent, None), saved_bytes=0))
    copy = width * stream.element_bytes
    exchanges = [Exchange("ep", copy, visits=top_k, experts=experts, node_limit=node_limit)]
    divisors = [Divisor("ep", "moe.num_experts", experts), Divisor("etp", "moe.hidden", hidden)]
    if shared:
        ops += _feed(stream, "shared", shared, stream.width, gated)
        exchanges.append(stream.region())
        divisors.append(Divisor("tp", "moe.shared_hidden", shared))
    if shared_gate:
        ops.append(stream.gemm("shared.router", 1, stream.width, None, quantised=False))
        # Its sum with the stream keeps nothing; the gate's gradient needs the expert's own output.
        weighting = stream.elementwise("shared.weighting", (), stream.width + 1, stream.width)
        ops.append(replace(weighting, saved_bytes=stream.token_bytes))
    return Part("moe", tuple(ops), tuple(divisors), tuple(exchanges))


def _repeated(op: Operation, passes: int) -> Operation:
    """An elementwise operation that runs as ``passes`` kernels instead of one."""
    return replace(
        op, input_bytes=op.input_bytes * passes, output_bytes=op.output_bytes * passes, kernels=op.kernels * passes
    )


def _visited(op: Operation, top_k: int, experts: int) -> Operation:
    """An operation of one expert -> of all experts, each token visiting ``top_k``."""
    return replace(
        op,
        kind="grouped_gemm" if op.kind == "gemm" else op.kind,
        axes=("ep", "etp"),
        parameters=op.parameters * experts,
        active_parameters=op.active_parameters * top_k,
        forward_flops=op.forward_flops * top_k,
        backward_flops=op.backward_flops * top_k,
        input_bytes=op.input_bytes * top_k,
        output_bytes=op.output_bytes * top_k,
        saved_bytes=op.saved_bytes * top_k,
        product=replace(op.product, experts=experts, visits=top_k) if op.product else None,
    )


def _float32(op: Operation) -> Operation:
    """A product whose output is float32 whatever the model's dtype: logits."""
    assert op.product is not None
    logits = op.product.out * FLOAT32_BYTES
    return replace(op, output_bytes=logits, saved_bytes=logits)


def layer(stream: Stream, *parts: Part) -> LayerWorkload:
    """A layer of the given branches, in order: mixer and feed-forward, or one of them."""
    exchanges: dict[Exchange, int] = {}
    for part in parts:
        for exchange in part.exchanges:
            exchanges[exchange] = exchanges.get(exchange, 0) + exchange.count
    return LayerWorkload(
        "/".join(part.kind for part in parts),
        tuple(op for part in parts for op in part.operations),
        tuple(rule for part in parts for rule in part.divisors),
        stream.token_bytes,
        tuple(replace(exchange, count=count) for exchange, count in exchanges.items()),
    )


def head(stream: Stream, vocab: int, *, tied: bool = False, norm_vectors: int = 1) -> LayerWorkload:
    """Final norm, output logits in float32 and the loss. ``tied``: the parameters are the embedding's."""
    product = _float32(stream.gemm("head", vocab, stream.width, quantised=False))
    if tied:
        product = replace(product, parameters=0, active_parameters=0)
    logits = vocab * FLOAT32_BYTES
    loss = Operation("loss", "elementwise", ("tp",), input_bytes=logits, kernels=4)
    operations = (stream.norm("final_norm", vectors=norm_vectors), product, loss)
    return LayerWorkload("head", operations, exchanges=(_half_region(stream),))


def embedding(stream: Stream, vocab: int, *, positions: int = 0, dropout: bool = False) -> LayerWorkload:
    """The lookup of tokens, and of ``positions`` learned ones."""
    size = vocab * stream.width
    lookup = Operation("embed", "lookup", ("tp",), size, size, output_bytes=stream.token_bytes)
    operations = [lookup]
    if positions:
        operations.append(stream.weight("positions", positions * stream.width))
    if dropout:
        operations.append(stream.dropout("embed.dropout"))
    return LayerWorkload("embedding", tuple(operations), exchanges=(_half_region(stream),))


def _half_region(stream: Stream) -> Exchange:
    """The embedding scatters and the head gathers: together they are one region."""
    return replace(stream.region(), bytes=stream.token_bytes / 2)


def with_mtp(
    stream: Stream, plain: LayerWorkload, blocks: Sequence[LayerWorkload], vocab: int, depth: int = 1, *, shared: bool
) -> LayerWorkload:
    """A head that also predicts ``depth`` tokens further (multi-token prediction, arXiv 2412.19437, section 2.2). Each
    depth runs ``blocks`` behind a product of the normed stream and the normed next embedding, and the model's own
    head; ``shared``: all depths with one set of parameters. It lives where the head does and is not recomputed."""
    once = [
        stream.norm("embedding_norm"),
        stream.norm("hidden_norm"),
        stream.gemm("projection", stream.width, 2 * stream.width),
        *(op for block in blocks for op in block.operations),
        *head(stream, vocab, tied=True).operations,
    ]
    operations = []
    for index in range(depth):
        for op in once:
            one = replace(op, name=f"mtp.{op.name}", remade=False)
            operations.append(replace(one, parameters=0, active_parameters=0) if shared and index else one)
    inner = [exchange for block in blocks for exchange in block.exchanges]
    exchanges = [replace(each, count=each.count * depth) for each in (stream.region(), *inner, _half_region(stream))]
    return replace(
        plain,
        operations=(*plain.operations, *operations),
        divisors=(*plain.divisors, *(rule for block in blocks for rule in block.divisors)),
        exchanges=(*plain.exchanges, *exchanges),
    )


def assemble(
    stream: Stream,
    vocab: int,
    layers: Sequence[LayerWorkload],
    *,
    tied: bool = False,
    ends: tuple[LayerWorkload, LayerWorkload] | None = None,
) -> Workload:
    """The whole model; ``ends``: its embedding and head, where they are not the plain ones."""
    first, last = ends or (embedding(stream, vocab), head(stream, vocab, tied=tied))
    return Workload(
        stream.seq_len, stream.width, stream.element_bytes, first, tuple(_distinct(layers)), last, tied_embedding=tied
    )


def _distinct(layers: Iterable[LayerWorkload]) -> Iterator[LayerWorkload]:
    """The layers, those of one name that cost differently numbered: ``attention/dense``, ``attention/dense.2``."""
    found: dict[str, list[LayerWorkload]] = {}
    for block in layers:
        alike = found.setdefault(block.kind, [])
        if block not in alike:
            alike.append(block)
        index = alike.index(block)
        yield replace(block, kind=f"{block.kind}.{index + 1}") if index else alike[0]
