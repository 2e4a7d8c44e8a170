"""Does this host multiply, copy and add up rightly, and how fast? In processes of its own: the parent needs no torch.

    python -m launch.preflight.compute RANK RANKS PORT [PARENT]     # one a GPU, or one for all cores; prints JSON

The known answer: matrices of small integers, whose product is exact in any order of summation. Row and column sums of
the product, weighted, must be what integer arithmetic on the host gives from the factors (algorithm-based fault
tolerance, Huang and Abraham 1984, IEEE TC C-33): a wrong element shows, with its row and column.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.preflight.report import Finding, Status
from launch.sweep.processes import end_with
from parallel.planning.hardware.collectives import PUBLISHED, Span, all_reduce_s
from parallel.planning.topology import HardwareTopology

if TYPE_CHECKING:
    import torch

HOME = Path(__file__).resolve().parents[2]
#: Side of the checked product, and of the timed one. 4096 products of such factors stay within 256 (standard deviation
#: 32), which bfloat16 represents.
SIDE, GPU_SIDE, TIMED_GPU_SIDE = 1024, 4096, 8192
#: Times that a product is repeated and must come out the same bits.
REPEATS, GPU_REPEATS = 4, 20
COPY_BYTES, GPU_COPY_BYTES, HOST_COPY_BYTES = 2**26, 2**30, 2**28
REDUCED_BYTES, GPU_REDUCED_BYTES = 2**22, 2**28
#: Weights of the sums: their period is prime to the sides.
PERIOD = 251
#: Of a figure that is known: from here down a device is slow, or out of order.
SLOW, BROKEN = 0.7, 0.4


@dataclass(frozen=True)
class Computed:
    """What one device did a second. ``flops``: of products; ``copy``: bytes read and written; ``host_copy``: from the
    host; ``reduce``: bytes of an all-reduce on this host. None: not measured. ``wrong``: what came out wrong."""

    device: str
    dtype: str
    flops: float
    copy: float
    host_copy: float | None = None
    reduce: float | None = None
    wrong: str | None = None


def factors(side: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two int8 matrices of -1, 0 and 1, half of them 0."""
    rng = np.random.default_rng(seed)
    values = np.array([-1, 0, 0, 1], np.int8)
    left, right = values[rng.integers(0, 4, (2, side, side), np.int8)]
    return left, right


def wrong_product(left: np.ndarray, right: np.ndarray, product: np.ndarray) -> str | None:
    """Where ``product`` is not the product of the factors, in words; None where it is, bit for bit."""
    possible = (product == np.rint(product)) & (np.abs(product) <= len(left))  # False for NaN
    if not possible.all():
        return _misplaced(*np.nonzero(~possible))
    whole = product.astype(np.int64)
    weights = 1 + np.arange(len(left), dtype=np.int64) % PERIOD
    a, b = left.astype(np.int64), right.astype(np.int64)
    rows = np.flatnonzero(whole @ weights != a @ (b @ weights))
    columns = np.flatnonzero(weights @ whole != (weights @ a) @ b)
    return _misplaced(rows, columns) if len(rows) or len(columns) else None


def _misplaced(rows: np.ndarray, columns: np.ndarray) -> str:
    rows, columns = np.unique(rows), np.unique(columns)
    where = f"{len(rows)} rows and {len(columns)} columns"
    if len(rows) == len(columns) == 1:
        where = f"the element in row {rows[0]}, column {columns[0]}"
    return f"a matrix product is wrong in {where}"


def check_product(
    device: torch.device, side: int, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
) -> str | None:
    """One product against its known answer, and repeated; what is wrong, in words. ``multiply``: default torch's."""
    import torch

    multiply = multiply or torch.matmul
    left, right = factors(side)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.from_numpy(one).to(device, dtype) for one in (left, right))
    first = multiply(a, b)
    if wrong := wrong_product(left, right, first.cpu().float().numpy()):
        return wrong
    if not all(torch.equal(multiply(a, b), first) for _ in range(REPEATS)):
        return "a matrix product does not come out the same twice"
    return None


def check_copy(device: torch.device, size: int) -> tuple[float, float | None, str | None]:
    """Rates of a copy on the device and from the host, and what came back wrong."""
    import torch

    on_gpu = device.type == "cuda"
    pattern = torch.arange(size // 4, dtype=torch.int32)
    pattern = pattern.pin_memory() if on_gpu else pattern
    there, from_host = _timed(device, lambda: pattern.to(device, non_blocking=True))
    source = there.repeat(max(1, GPU_COPY_BYTES // size)) if on_gpu else there
    target = torch.empty_like(source)
    _, took = _timed(device, lambda: target.copy_(source))
    wrong = None if torch.equal(target.cpu()[: len(pattern)], pattern) else "bytes change when they are copied"
    rate = 2 * source.numel() * 4 / took
    return rate, size / from_host if on_gpu else None, wrong


def check_reduce(device: torch.device, rank: int, ranks: int, size: int) -> tuple[float, str | None]:
    """Rate of an all-reduce over the devices of this host, and whether the sum is right."""
    import torch
    import torch.distributed as dist

    base = torch.arange(size // 4, dtype=torch.int32, device=device).remainder_(7).float()
    expected = ranks * base + ranks * (ranks - 1) / 2
    best = 0.0
    for _ in range(REPEATS):
        mine = base + rank
        dist.barrier()
        _, took = _timed(device, partial(dist.all_reduce, mine), warm=False)
        best = max(best, size / took)
        if not torch.equal(mine, expected):
            return best, f"an all-reduce over {ranks} devices gave a wrong sum"
    return best, None


def _timed(device: torch.device, work: Callable[[], Any], warm: bool = True) -> tuple[Any, float]:
    """The result and the seconds of the best of some runs; a run that is not repeatable is run once."""
    import torch

    best, result = float("inf"), None
    for _ in range(1 + REPEATS if warm else 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return result, best


def compute(rank: int, ranks: int, port: int) -> Computed:
    """All checks of one device: GPU ``rank``, or this host's cores."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    reduced: float | None = None
    if on_gpu:
        torch.cuda.set_device(device)
    if ranks > 1:  # before anything is measured: devices that share power and heat are to work at one time
        meet = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("nccl" if on_gpu else "gloo", init_method=meet, rank=rank, world_size=ranks)
    wrong = check_product(device, GPU_SIDE if on_gpu else SIDE)
    side = TIMED_GPU_SIDE if on_gpu else SIDE
    factor = torch.ones(side, side, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    out = torch.empty_like(factor)
    repeats = GPU_REPEATS if on_gpu else 1

    def products() -> None:
        for _ in range(repeats):
            torch.matmul(factor, factor, out=out)

    _, took = _timed(device, products)
    copy, host_copy, wrong_copy = check_copy(device, HOST_COPY_BYTES if on_gpu else COPY_BYTES)
    wrong_sum = None
    if ranks > 1:
        reduced, wrong_sum = check_reduce(device, rank, ranks, GPU_REDUCED_BYTES if on_gpu else REDUCED_BYTES)
        dist.destroy_process_group()
    dtype = "bfloat16" if on_gpu else "float32"
    flops = repeats * 2 * side**3 / took
    return Computed(name, dtype, flops, copy, host_copy, reduced, wrong or wrong_copy or wrong_sum)


def measure(ranks: int, threads: int, timeout_s: float) -> list[Computed]:
    """Run ``compute`` in so many processes. Raises OSError with what they said last where one fails,
    TimeoutError where one does not come back."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "launch.preflight.compute"]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(port), str(os.getpid())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HOME,
            env=environment,
        )
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        said = [child.communicate(timeout=max(0.1, deadline - time.monotonic())) for child in children]
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.communicate()
    for child, (_, errors) in zip(children, said, strict=True):
        if child.returncode:
            last = errors.strip().splitlines()
            raise OSError(last[-1] if last else f"exit code {child.returncode}")
    return [Computed(**json.loads(out.splitlines()[-1])) for out, _ in said]


def judge(found: Sequence[Computed], topology: HardwareTopology | None) -> list[Finding]:
    """Findings of the devices of this host, each figure against the topology's where that knows it."""
    findings = []
    for index, one in enumerate(found):
        check = f"GPU {index} computes" if one.dtype == "bfloat16" else "cores compute"
        if one.wrong:
            findings.append(Finding(check, "refuse", one.wrong, "take the node out: its numbers cannot be trusted"))
            continue
        status, notes = _against(one, len(found), topology)
        text = f"{one.flops / 1e12:.3g} TFLOP/s {one.dtype}, copies at {one.copy / 1e9:.3g} GB/s"
        text += "" if one.reduce is None else f", all-reduce at {one.reduce / 1e9:.3g} GB/s"
        advice = "see to cooling, power and links of the node, or take another" if notes else ""
        findings.append(Finding(check, status, "; ".join([text, *notes]), advice))
    return findings


def _against(one: Computed, devices: int, topology: HardwareTopology | None) -> tuple[Status, list[str]]:
    if topology is None or one.dtype != "bfloat16":
        return "ok", []
    shares: dict[str, float] = {}
    if peak := topology.device.peak_flops.get(one.dtype):
        shares["products"] = one.flops / peak
    if topology.device.memory_bandwidth:
        shares["copies"] = one.copy / topology.device.memory_bandwidth
    if one.reduce and devices > 1 and topology.domain.bandwidth and topology.domain.latency_s is not None:
        expected = all_reduce_s(float(GPU_REDUCED_BYTES), Span(devices, devices), topology, PUBLISHED)
        shares["all-reduce"] = one.reduce / (GPU_REDUCED_BYTES / expected)
    notes = [f"{name} at {share:.0%} of what {topology.name} states" for name, share in shares.items() if share < SLOW]
    status: Status = "refuse" if any(share < BROKEN for share in shares.values()) else "warn" if notes else "ok"
    return status, notes


def rates_of(found: Sequence[Computed]) -> Mapping[str, float]:
    """The slowest device's figures, to compare with other nodes'."""
    rates = {"products": min(one.flops for one in found), "copies": min(one.copy for one in found)}
    reduced = [one.reduce for one in found if one.reduce is not None]
    return rates | ({"all-reduce": min(reduced)} if reduced else {})


def main(rank: int, ranks: int, port: int, parent: int | None = None) -> None:
    if parent is not None:
        end_with(parent)
    print(json.dumps(asdict(compute(rank, ranks, port))), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
