"""Products with a known answer: a single wrong bit is found and placed, a right product never blamed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.preflight import compute
from launch.preflight.compute import Computed, check_product, factors, judge, wrong_product
from parallel.planning.topology import load_hardware
from tests.house.sources import HOME

CPU = torch.device("cpu")


@pytest.mark.parametrize("side", [1, 3, 64, 257, 600])
def test_a_right_product_is_right_whatever_the_side(side: int) -> None:
    left, right = factors(side)
    exact = np.array(
        [[sum(int(x) * int(y) for x, y in zip(row, column)) for column in right.T[:3]] for row in left[:3]]
    )
    product = left.astype(np.float32) @ right.astype(np.float32)
    assert np.array_equal(product[:3, :3], exact)
    assert wrong_product(left, right, product) is None and check_product(CPU, side) is None


@settings(max_examples=60)
@given(st.integers(0, 95), st.integers(0, 95), st.integers(0, 31))
def test_one_flipped_bit_of_a_product_is_found_and_placed(row: int, column: int, bit: int) -> None:
    """Any of the 32 bits of any element; the only flip that changes nothing is the sign of a zero."""

    def flipping(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = a @ b
        product.view(torch.int32)[row, column] ^= -(2**31) if bit == 31 else 1 << bit
        return product

    wrong = check_product(CPU, 96, flipping)
    left, right = factors(96)
    if bit == 31 and int(left[row].astype(int) @ right[:, column].astype(int)) == 0:
        assert wrong is None
    else:
        assert wrong == f"a matrix product is wrong in the element in row {row}, column {column}"


def test_errors_that_cancel_in_a_plain_sum_are_found() -> None:
    def swapped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = a @ b
        product[5, 7] += 3
        product[5, 9] -= 3
        return product

    assert "1 rows and 2 columns" in str(check_product(CPU, 96, swapped))


def test_a_product_that_differs_from_time_to_time_is_found() -> None:
    calls = iter(range(100))

    def fickle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b + (1.0 if next(calls) == 3 else 0.0)

    assert check_product(CPU, 64, fickle) == "a matrix product does not come out the same twice"


def test_a_product_of_nan_is_wrong() -> None:
    assert "16 rows and 16 columns" in str(check_product(CPU, 16, lambda a, b: (a @ b) * torch.nan))


@pytest.mark.verify
def test_the_product_checked_on_a_gpu_fits_bfloat16() -> None:
    left, right = (torch.from_numpy(one).float() for one in factors(compute.GPU_SIDE))
    product = left @ right
    assert product.abs().max() <= 256 and torch.equal(product.bfloat16().float(), product)


def test_two_processes_add_up_rightly_and_say_how_fast() -> None:
    """Over gloo here; over NCCL it is the same code."""
    found = compute.measure(2, threads=1, timeout_s=250)
    assert [one.wrong for one in found] == [None, None]
    for one in found:
        assert one.reduce and one.reduce > 0 and one.flops > 0 and one.copy > 0
    assert set(compute.rates_of(found)) == {"products", "copies", "all-reduce"}


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys; sys.exit('CUDA error: an illegal memory access')", "an illegal memory access"),
        ("import os; os.abort()", "exit code -6"),
    ],
)
def test_a_process_that_dies_is_told_with_its_last_words(
    program: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(program, tmp_path, monkeypatch)
    with pytest.raises(OSError, match=says):
        compute.measure(1, threads=1, timeout_s=60)


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in("import time; time.sleep(600)", tmp_path, monkeypatch)
    with pytest.raises(TimeoutError, match=r"no answer within 1\.5 s"):
        compute.measure(1, threads=1, timeout_s=1.5)


def test_no_process_outlives_the_one_that_started_it() -> None:
    """Killed with -9 while its children compute, the parent leaves none behind."""
    program = "from launch.preflight import compute; compute.measure(2, 1, 120.0)"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=HOME)
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    # Until they have loaded torch they have long said with whom they end.
    while time.monotonic() < deadline and not (len(children) == 2 and all(map(has_torch, children))):
        children = psutil.Process(parent.pid).children()
        time.sleep(0.01)
    assert len(children) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def has_torch(process: psutil.Process) -> bool:
    try:
        return any("libtorch" in mapped.path for mapped in process.memory_maps())
    except psutil.Error:
        return False


def stand_in(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program in place of this interpreter."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_figures_of_a_gpu_are_held_against_the_topology() -> None:
    h100 = load_hardware("h100")
    peak, memory = h100.device.peak_flops["bfloat16"], h100.known("device.memory_bandwidth")
    # NVIDIA's nccl-tests on eight H100: 256 MiB take 1112.5 us.
    well = Computed("H100", "bfloat16", 0.75 * peak, 0.9 * memory, None, compute.GPU_REDUCED_BYTES / 1112.5e-6)
    assert [finding.status for finding in judge([well] * 8, h100)] == ["ok"] * 8
    throttled = Computed("H100", "bfloat16", 0.3 * peak, 0.9 * memory, None, well.reduce)
    (told,) = judge([throttled], h100)
    assert told.status == "refuse" and "products at 30% of what" in told.found
    link_down = Computed("H100", "bfloat16", 0.75 * peak, 0.9 * memory, None, 0.5 * (well.reduce or 0))
    told = judge([*[well] * 7, link_down], h100)[7]
    assert told.status == "warn" and told.check == "GPU 7 computes" and "all-reduce at" in told.found
    wrong = Computed("H100", "bfloat16", peak, memory, wrong="a matrix product is wrong")
    assert judge([wrong], h100)[0].status == "refuse"
    assert judge([throttled], None)[0].status == "ok", "nothing is known, nothing is blamed"


@pytest.mark.gpu
def test_this_gpu_computes_rightly() -> None:
    (found,) = compute.measure(1, threads=1, timeout_s=120)
    assert found.wrong is None and found.dtype == "bfloat16" and found.host_copy
