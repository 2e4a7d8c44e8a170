"""Every operator's chosen implementation against its float64 reference, on the device one is on.

``python -m kernels.selfcheck [--short] [--device cuda]`` prints a table of errors and exits 1 if one exceeds its bound.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import registry, tolerance
from kernels.gated_delta.op import gated_delta
from kernels.samples import Decay, cu_seqlens_of, gated_delta_inputs, short_conv_inputs
from kernels.short_conv.op import short_conv


@dataclass(frozen=True)
class Row:
    """One output of one case: its :func:`tolerance.error` and what is admitted."""

    op: str
    implementation: str
    dtype: str
    case: str
    output: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class _Case:
    op: str
    name: str
    inputs: dict[str, Tensor]
    cu_seqlens: Tensor
    outputs: tuple[str, ...]
    call: Callable[..., Any]


def check(short: bool = False, device: str | None = None) -> list[Row]:
    """Runs the checks; ``short`` takes well under a second on CPU. ``device``: cuda where there is one, else cpu."""
    at = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [torch.float32] if short else [torch.float64, torch.float32, torch.bfloat16]
    return [row for dtype in dtypes for case in _cases(dtype, short) for row in _compare(case, dtype, at)]


def _cases(dtype: torch.dtype, short: bool) -> Iterator[_Case]:
    lengths = [65, 1, 30] if short else [130, 1, 63, 64, 65]
    cu_seqlens = cu_seqlens_of(lengths)
    decays: Sequence[Decay] = ("trained", "extreme") if short else ("trained", "none", "extreme")
    for heads in ((1, 2),) if short else ((2, 2), (1, 3)):
        for decay in decays:
            inputs = gated_delta_inputs(lengths, heads, (16, 24), dtype, decay)
            name = f"heads {heads[0]}/{heads[1]}, decay {decay}"
            yield _Case("gated_delta", name, inputs, cu_seqlens, ("o", "final_state"), gated_delta)
    for width in (4,) if short else (1, 2, 4):
        inputs = short_conv_inputs(lengths, 40, width, dtype)
        yield _Case("short_conv", f"{width} taps", inputs, cu_seqlens, ("y",), short_conv)


def _compare(case: _Case, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    actual = _outputs_and_gradients(case, {name: x.to(device) for name, x in case.inputs.items()})
    with registry.force(case.op, "reference"):
        expected = _outputs_and_gradients(case, {name: x.double() for name, x in case.inputs.items()})
    shape = tuple(next(iter(case.inputs.values())).shape[1:])
    chosen = registry.choose(case.op, device, dtype, shape).name
    for output, value in actual.items():
        bound = tolerance.bound(dtype, output)
        error = tolerance.error(value, expected[output])
        yield Row(case.op, chosen, str(dtype).removeprefix("torch."), case.name, output, error, bound)


def _outputs_and_gradients(case: _Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every output, and the gradient of every input for fixed random cotangents."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    device = next(iter(leaves.values())).device
    result = case.call(**leaves, cu_seqlens=case.cu_seqlens.to(device))
    outputs = dict(zip(case.outputs, result if isinstance(result, tuple) else (result,), strict=True))
    generator = torch.Generator().manual_seed(1)
    # Drawn in float32 and rounded to bfloat16, so that every dtype and device is given the same cotangents.
    cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return outputs | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def table(rows: Sequence[Row]) -> str:
    """The worst case of every operator, dtype and output, and every row that failed."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.op, row.dtype, row.output)
        if key not in worst or row.error > worst[key].error:
            worst[key] = row
    shown = list(worst.values()) + [row for row in rows if not row.passed and row not in worst.values()]
    lines = [f"{'operator':12} {'runs':10} {'dtype':9} {'output':14} {'error':>8} {'bound':>8}  worst case"]
    for row in shown:
        verdict = "" if row.passed else "   FAILED"
        lines.append(
            f"{row.op:12} {row.implementation:10} {row.dtype:9} {row.output:14} "
            f"{row.error:8.1e} {row.bound:8.1e}  {row.case}{verdict}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.selfcheck", description=__doc__)
    parser.add_argument("--short", action="store_true", help="float32 only, few cases")
    parser.add_argument("--device", help="cpu or cuda; cuda where there is one")
    arguments = parser.parse_args()
    rows = check(arguments.short, arguments.device)
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows)} comparisons, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
