"""Every operator's implementations against its float64 reference, on the device one is on.

``python -m kernels.selfcheck [--short] [--device cuda]`` prints a table of errors and exits 1 if one exceeds its bound.
In full every implementation that can run there is tried, the short form tries the chosen ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import registry, tolerance
from kernels.cases import CASES, Case


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


def check(short: bool = False, device: str | None = None) -> list[Row]:
    """Runs the checks; ``short`` takes well under a second on CPU. ``device``: cuda where there is one, else cpu."""
    at = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    if short:
        dtypes = [torch.bfloat16] if at.type == "cuda" else [torch.float32]
    every = ((dtype, case) for dtype in dtypes for cases in CASES for case in cases(dtype, short))
    return [row for dtype, case in every for row in compare(case, dtype, at, every=not short)]


def compare(case: Case, dtype: torch.dtype, device: torch.device, every: bool = False) -> Iterator[Row]:
    """A row for every output and gradient of a case, by the implementation that is chosen for it; with ``every``, by
    each that can run it, but the reference."""
    with registry.force(case.op, "reference"):
        expected = outputs_and_gradients(case, {name: x.double() for name, x in case.inputs.items()})
    chosen = [registry.choose(case.op, device, dtype, case.shape)]
    able = (i for i in registry.able(case.op, device, dtype, case.shape) if i.name != "reference")
    for implementation in able if every else chosen:
        with registry.force(case.op, implementation.name):
            actual = outputs_and_gradients(case, {name: x.to(device) for name, x in case.inputs.items()})
        for output, value in actual.items():
            bound = tolerance.bound(dtype, output)
            error = tolerance.error(value, expected[output])
            kind = str(dtype).removeprefix("torch.")
            yield Row(case.op, implementation.name, kind, case.name, output, error, bound)


def outputs_and_gradients(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every output, and the gradient of every input for fixed random cotangents."""
    leaves = {name: x.detach().requires_grad_(case.differentiable) for name, x in inputs.items()}
    device = next(iter(leaves.values())).device
    constants = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.constants.items()}
    result = case.call(**leaves, **constants)
    outputs = dict(zip(case.outputs, result if isinstance(result, tuple) else (result,), strict=True))
    if not case.differentiable:
        return outputs
    generator = torch.Generator().manual_seed(1)
    # Drawn in float32 and rounded to bfloat16, so that every dtype and device is given the same cotangents.
    cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return outputs | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def table(rows: Sequence[Row]) -> str:
    """The worst case of every operator, implementation, dtype and output, and every row that failed."""
    worst: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        key = (row.op, row.implementation, row.dtype, row.output)
        if key not in worst or row.error > worst[key].error:
            worst[key] = row
    shown = list(worst.values()) + [row for row in rows if not row.passed and row not in worst.values()]
    lines = [f"{'operator':13} {'runs':10} {'dtype':9} {'output':14} {'error':>8} {'bound':>8}  worst case"]
    for row in shown:
        verdict = "" if row.passed else "   FAILED"
        lines.append(
            f"{row.op:13} {row.implementation:10} {row.dtype:9} {row.output:14} "
            f"{row.error:8.1e} {row.bound:8.1e}  {row.case}{verdict}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.selfcheck", description=__doc__)
    parser.add_argument("--short", action="store_true", help="few cases of what is chosen, in one dtype")
    parser.add_argument("--device", help="cpu or cuda; cuda where there is one")
    arguments = parser.parse_args()
    rows = check(arguments.short, arguments.device)
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows)} comparisons, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
