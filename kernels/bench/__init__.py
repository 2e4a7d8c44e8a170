"""``stoker bench kernels``: ours against peers and the physical limit, on the processor and, where there is one, a GPU.
Not here: anything a run of the trainer needs; a peer that is missing, refuses or fails is a row with the reason.
Start with ``measure.py``, then ``gpu.py``."""

from kernels.bench.measure import run
from kernels.bench.rows import Row, table, versions

__all__ = ["Row", "run", "table", "versions"]
