"""The one table of error bounds: how far an implementation may be from the float64 reference on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

#: Relative L2 error by dtype of the inputs, then by output; "*" is any output not named. Gradients are "d" + input.
#: float64: rounding of some hundred additions. float32: 5x the largest error measured by ``kernels.selfcheck`` on CPU
#: (4e-7; dg, a double sum over pairs, 6e-7). bfloat16: rounding of the output alone gives 1.7e-3 on CPU, where all is
#: computed in float32; the rest is room for kernels that multiply in bfloat16. Of those, run on the host, the largest
#: error was 3.8e-3 for o, 4.9e-3 for dk, 4e-3 for dbeta and 5.2e-3 for dg, all without decay.
BOUNDS: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"*": 1e-12},
    torch.float32: {"*": 2e-6, "dg": 3e-6},
    torch.bfloat16: {
        "*": 4e-3,
        "dq": 6e-3,
        "dk": 6e-3,
        "dv": 6e-3,
        "dinitial_state": 6e-3,
        "dbeta": 8e-3,
        "dg": 1.5e-2,
    },
}


def bound(dtype: torch.dtype, output: str) -> float:
    """The largest admitted :func:`error` of ``output``."""
    bounds = BOUNDS[dtype]
    return bounds.get(output, bounds["*"])


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, ``|actual - expected| / |expected|`` in float64; absolute where ``expected`` is zero;
    inf if ``actual`` holds anything that is not finite."""
    if not torch.isfinite(actual).all():
        return float("inf")
    exact = expected.detach().to("cpu", torch.float64)
    distance = (actual.detach().to("cpu", torch.float64) - exact).norm().item()
    size = exact.norm().item()
    return distance / size if size else distance
