"""``python -m tests.parity.bands``: how far float32 and bfloat16 curves lie from one process, into docs/parity.md.

A layout adds in another order, so below float64 its curve is not that of one process. The band of an axis is the
largest relative difference of the loss over the steps; the yardstick is what other micro-batches do on one process.
"""

from __future__ import annotations

import argparse
import datetime
import re
from importlib.metadata import version
from pathlib import Path

from parallel.planning.plan import ParallelPlan
from stoker.files import write_atomic
from stoker.version import code_commit
from tests.parity import jobs
from tests.parity.pool import Pool
from tests.parity.specs import HYBRID, ONE, plan

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
BETWEEN = re.compile(r"(?<=<!-- bands -->\n).*(?=<!-- /bands -->)", re.DOTALL)

LAYOUTS: dict[str, ParallelPlan] = {
    "one process, 3 micro-batches for 1": plan(1),
    "recompute selective": plan(1, ONE.micro_batch, recompute="selective"),
    "recompute full": plan(1, ONE.micro_batch, recompute="full"),
    "dp 2": plan(2),
    "dp 2, ZeRO-1": plan(2, zero=1),
    "tp 2": plan(2, tp=2),
    "tp 2, sequence parallel": plan(2, tp=2, sequence_parallel=True),
    "pp 2": plan(2, pp=2),
    "pp 2, vpp 2": plan(2, pp=2, vpp=2),
    "ep 2": plan(2, ep=2),
    "etp 2": plan(2, etp=2),
}


def measure(pool: Pool, dtype: str, steps: int) -> dict[str, tuple[float, float]]:
    """Per layout, the largest relative difference of the loss in the first tenth of the steps and in all of them."""

    def losses(layout: ParallelPlan) -> list[float]:
        curve: list[float] = pool.run(layout.world_size, jobs.losses, HYBRID, layout.to_dict(), dtype, steps)[0]
        return curve

    reference, bands = losses(ONE), {}
    for name, layout in LAYOUTS.items():
        apart = [abs(a - b) / abs(b) for a, b in zip(losses(layout), reference, strict=True)]
        bands[name] = max(apart[: max(1, steps // 10)]), max(apart)
        print(f"{dtype}  {name}: {bands[name][1]:.1e}", flush=True)
    return bands


def table(bands: dict[str, dict[str, tuple[float, float]]], steps: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    commit = code_commit() or "unknown"
    lines = [
        f"Measured {datetime.date.today().isoformat()} at commit {commit} on CPU and gloo with {packages}, by",
        f"`python -m tests.parity.bands --steps {steps}`:",
        "the hybrid mixture of experts of the suite, learning rate 1e-3, against one process of the same dtype;",
        f"largest relative difference of the loss in the first {max(1, steps // 10)} steps / in all {steps}.",
        "",
        "| layout | " + " | ".join(bands) + " |",
        "|---|" + "---|" * len(bands),
    ]
    for name in LAYOUTS:
        cells = (f"{bands[dtype][name][0]:.1e} / {bands[dtype][name][1]:.1e}" for dtype in bands)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    pool = Pool()
    try:
        bands = {dtype: measure(pool, dtype, steps) for dtype in ("float32", "bfloat16")}
    finally:
        pool.close()
    text = DOCUMENT.read_text()
    written, count = BETWEEN.subn(lambda _: table(bands, steps), text)
    assert count == 1, f"{DOCUMENT} needs one pair of <!-- bands --> and <!-- /bands -->"
    write_atomic(DOCUMENT, written)


if __name__ == "__main__":
    main()
