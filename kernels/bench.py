"""Ours against the torch fallbacks of Hugging Face transformers (and torch's own convolution) on one CPU thread.

``python -m kernels.bench`` prints a table of times and ratios with the versions measured. Peers run in turns with ours,
in the same process; the time of each is the median over the rounds, and the ratio is the median of the rounds' ratios,
which a busy machine disturbs less than either time.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from statistics import median

import torch
from torch import Tensor

from kernels.gated_delta.op import gated_delta
from kernels.samples import cu_seqlens_of, gated_delta_inputs, short_conv_inputs
from kernels.short_conv.op import short_conv


@dataclass(frozen=True)
class Row:
    """``ratio``: peer's time over ours, above 1 where we are faster; None with ``note`` saying why, if not measured."""

    op: str
    case: str
    peer: str
    ours_ms: float | None
    peer_ms: float | None
    ratio: float | None
    note: str = ""


def run(rounds: int = 9, tokens: int = 2048) -> list[Row]:
    """All rows, float32, one thread. Takes about ``rounds`` seconds."""
    with _one_thread():
        return [*_gated_delta(rounds, tokens), *_short_conv(rounds, tokens)]


def versions() -> dict[str, str]:
    """What was measured, and on what."""
    found = {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
    for package in ("torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as text, versions first."""
    lines = [", ".join(f"{name} {value}" for name, value in versions().items()) + ", one thread, float32"]
    lines.append(f"{'operator':12} {'case':46} {'ours ms':>8} {'peer ms':>8} {'ratio':>6}  peer")
    for row in rows:
        figures = "".join(f" {'unknown' if x is None else format(x, '.1f'):>8}" for x in (row.ours_ms, row.peer_ms))
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(f"{row.op:12} {row.case:46}{figures} {ratio:>6}  {row.peer}{row.note and ': ' + row.note}")
    return "\n".join(lines)


def _gated_delta(rounds: int, tokens: int) -> Iterator[Row]:
    peer = "transformers qwen3_next torch_chunk_gated_delta_rule"
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError as error:
        yield Row("gated_delta", "all", peer, None, None, None, f"skipped, {error}")
        return

    def shape(num_qk_heads: int) -> Iterator[Row]:
        inputs = gated_delta_inputs([tokens], (num_qk_heads, 8), (64, 64), torch.float32)
        q, k, v, g, beta = leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
        cu_seqlens = cu_seqlens_of([tokens])

        def ours() -> Tensor:
            return gated_delta(q, k, v, g, beta, cu_seqlens)[0]

        def theirs() -> Tensor:
            batch = (x.unsqueeze(0) for x in leaves)
            return torch_chunk_gated_delta_rule(*batch, output_final_state=True)[0].squeeze(0)

        name = f"T={tokens}, heads {num_qk_heads}/8, K=V=64"
        return _rows("gated_delta", name, peer, ours, theirs, leaves, torch.randn_like(v), rounds)

    yield from shape(8)
    yield from shape(4)


def _short_conv(rounds: int, tokens: int) -> Iterator[Row]:
    leaves = [x.requires_grad_() for x in short_conv_inputs([tokens], 1536, 4, torch.float32).values()]
    x, weight = leaves
    cu_seqlens = cu_seqlens_of([tokens])

    def ours() -> Tensor:
        return short_conv(x, weight, cu_seqlens)

    def theirs() -> Tensor:
        channels_first = torch.nn.functional.conv1d(x.T.unsqueeze(0), weight.unsqueeze(1), padding=3, groups=1536)
        return torch.nn.functional.silu(channels_first[0, :, :tokens]).T

    peer = "torch conv1d + silu, as transformers calls it"
    shape = f"T={tokens}, C=1536, W=4"
    yield from _rows("short_conv", shape, peer, ours, theirs, leaves, torch.randn_like(x), rounds)


def _rows(
    op: str,
    shape: str,
    peer: str,
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    leaves: list[Tensor],
    cotangent: Tensor,
    rounds: int,
) -> Iterator[Row]:
    """One row for the forward alone (no gradient recorded), one for forward and backward."""

    def forward(call: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            call()

    def both(call: Callable[[], Tensor]) -> None:
        torch.autograd.grad(call(), leaves, cotangent)

    for name, measured in (("forward", forward), ("forward + backward", both)):
        pairs = []
        for index in range(rounds + 1):
            pair = _seconds(measured, ours), _seconds(measured, theirs)
            if index:  # the first round warms up
                pairs.append(pair)
        ours_ms, peer_ms = (1e3 * median(column) for column in zip(*pairs, strict=True))
        yield Row(op, f"{shape}, {name}", peer, ours_ms, peer_ms, median(b / a for a, b in pairs))


def _seconds(measured: Callable[[Callable[[], Tensor]], None], call: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    measured(call)
    return time.perf_counter() - begin


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    print(table(run()))
