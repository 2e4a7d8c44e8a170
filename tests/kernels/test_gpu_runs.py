"""The CUDA kernels in use: again and again, in graphs, beside other work, without waiting, very long. `make gpu-check`.

Everything here runs problems of the benchmark, forward and backward, on the device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import registry, toolchain
from kernels.bench import gpu as bench
from kernels.bench.problems import Problem, delta_problem
from kernels.bench.shapes import MAIN, Shape
from kernels.bench.timing import GraphTimer
from kernels.cases import CASES
from kernels.samples import cu_seqlens_of
from kernels.tolerance import bound
from tests.kernels.delta_rules import BF16, RULES, Rule
from tests.kernels.device_checks import PART, trains_like_float32

pytestmark = pytest.mark.gpu

HOME = Path(__file__).resolve().parents[2]
KINDS = [kind for kind in bench.BUILD if kind != "decode"]
SMALL = Shape(1024, 4, (4, 8))
ROUNDS = 1000


def need_kernel(op: str, shape: tuple[int, ...]) -> None:
    chosen = registry.choose(op, torch.device("cuda"), BF16, shape).name
    if chosen not in ("cuda", "hopper", "wgmma"):
        assert toolchain.cuda_library() is None, f"{op}: {chosen} runs where there are CUDA kernels"
        pytest.skip(f"{op} has no CUDA kernel here: {chosen} runs; {toolchain.why_not('cuda')}")


def problem_of(kind: str, shape: Shape = SMALL) -> Problem:
    problem = bench.BUILD[kind](shape, torch.device("cuda"))
    need_kernel(problem.op, problem.dispatch)
    if problem.layer:
        need_kernel("prologue", (*shape.dims, 4))
        need_kernel("epilogue", shape.dims[1:])
    return problem


def step_of(problem: Problem) -> Callable[[], list[Tensor]]:
    """A forward and its backward, for fixed cotangents; returns outputs and gradients."""

    def outputs() -> list[Tensor]:
        result = problem.ours()
        return [result] if isinstance(result, Tensor) else list(result)

    cotangents = [torch.randn_like(x) for x in outputs()]

    def step() -> list[Tensor]:
        results = outputs()
        return [x.detach() for x in results] + list(torch.autograd.grad(results, problem.leaves, cotangents))

    return step


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.fixture(params=[*KINDS, *(f"{rule.op} by hopper" for rule in RULES)])
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    kind, _, other = request.param.partition(" by ")
    problem = problem_of(kind)
    if not other:
        yield problem
        return
    if other not in {known.name for known in registry.able(problem.op, torch.device("cuda"), BF16, problem.dispatch)}:
        pytest.skip(f"{kind} has no {other} kernel on this device")
    with registry.force(problem.op, other):
        yield problem


def test_a_thousand_runs_give_the_same_bits(problem: Problem) -> None:
    step = step_of(problem)
    expected = step()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(ROUNDS):
        for actual, wanted in zip(step(), expected):
            differing += (actual.view(torch.uint8) != wanted.view(torch.uint8)).any()
    assert differing.item() == 0


def test_runs_beside_other_work_and_on_other_streams_give_the_same_bits(problem: Problem) -> None:
    step = step_of(problem)
    expected = step()
    torch.cuda.synchronize()
    load, streams = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(3)]
    a = torch.randn(4096, 4096, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        with torch.cuda.stream(load):
            a @ a
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    assert all(same(result, expected) for result in results)


def test_a_graph_replays_with_new_inputs(problem: Problem) -> None:
    """Captured forward and backward, replayed on other numbers in the same place, give what eager calls give."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step = step_of(problem)
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.no_grad():
            for leaf in problem.leaves:
                leaf.copy_(leaf.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, step())


def test_the_host_never_waits(problem: Problem) -> None:
    step = step_of(problem)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_memory_held_before_is_never_read(problem: Problem) -> None:
    """torch fills every tensor that it leaves uninitialised with NaN, workspaces and outputs among them."""
    step = step_of(problem)
    expected = step()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert same(step(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_recomputed_forward_gives_the_bits_of_the_first(problem: Problem) -> None:
    """Under activation checkpointing, which calls the forward once without keeping anything and once more to keep."""
    first = problem.ours()
    cotangents = [torch.randn_like(x) for x in ([first] if isinstance(first, Tensor) else first)]
    results = []
    for recompute in (False, True):
        kept = checkpoint(problem.ours, use_reentrant=False) if recompute else problem.ours()
        several = [kept] if isinstance(kept, Tensor) else list(kept)
        grads = torch.autograd.grad(several, problem.leaves, cotangents)
        results.append([x.detach() for x in several] + list(grads))
    assert same(*results)


def test_decode_gives_the_same_bits_in_a_graph_and_a_thousand_times() -> None:
    (case,) = [c for cases in CASES for c in cases(BF16, True) if c.op == "decode" and c.inputs["g"].dim() == 3]
    need_kernel("decode", case.shape)
    inputs = {name: x.cuda() for name, x in case.inputs.items()}
    slots = case.constants["slots"].cuda()

    def step() -> list[Tensor]:
        return list(case.call(**inputs, slots=slots))

    expected = step()
    assert all(same(step(), expected) for _ in range(ROUNDS))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)


@pytest.mark.parametrize("op", [rule.op for rule in RULES])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_a_million_tokens(backward: bool, op: str) -> None:
    """More than 2^31 elements in a tensor: the last head's last tokens are as accurate as all of it."""
    Hk, Hv = (17, 17) if backward or op == "kda" else (16, 64)
    N, device = 1 << 20, torch.device("cuda")
    try:
        problem = delta_problem(op, Shape(N, 1, (Hk, Hv)), device)
        need_kernel(op, problem.dispatch)
        assert problem.inputs["v"].numel() > 2**31
        do = torch.randn_like(problem.inputs["v"])
        with torch.set_grad_enabled(backward):
            o = problem.ours()
            assert isinstance(o, Tensor)
            grads = torch.autograd.grad(o, problem.leaves, do) if backward else ()
        found = {"o": o.detach()[:, -1:], **{f"d{n}": x[:, -1:] for n, x in zip(problem.inputs, grads)}}
        found = {name: x.clone() for name, x in found.items()}
        leaves = {n: x.detach()[:, -1:].double().requires_grad_(backward) for n, x in problem.inputs.items()}
        do_last, cu_seqlens = do[:, -1:].double(), problem.cu_seqlens
        del problem, o, grads, do
        with registry.force(op, "chunked"), torch.set_grad_enabled(backward):
            (rule,) = (rule for rule in RULES if rule.op == op)
            o_exact, _ = rule.call(**leaves, cu_seqlens=cu_seqlens)
            exact_grads = torch.autograd.grad(o_exact, list(leaves.values()), do_last) if backward else ()
    except torch.OutOfMemoryError as error:
        pytest.skip(f"a million tokens do not fit: {str(error).splitlines()[0][:100]}")
    exact = {"o": o_exact.detach(), **{f"d{n}": x for n, x in zip(leaves, exact_grads)}}
    for name, expected in exact.items():
        for rows, slack in ((slice(None), 1.0), (slice(-4096, None), PART)):
            distance = (found[name][rows].double() - expected[rows]).norm() / expected[rows].norm()
            print(f"{name}, {'all tokens' if slack == 1 else 'the last 4096'}: {distance.item():.1e}")
            assert distance <= slack * bound(BF16, name), name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.op)
def test_seventy_thousand_sequences(rule: Rule) -> None:
    """More than a grid's second dim can count (65,535)."""
    lengths = [1, 0] * 35_000
    need_kernel(rule.op, (64, 64))
    inputs = {name: x.cuda() for name, x in rule.inputs(lengths, (1, 1), (64, 64), BF16).items()}
    o, final_state = rule.call(**inputs, cu_seqlens=cu_seqlens_of(lengths).cuda())
    state = inputs["initial_state"]
    assert torch.equal(final_state[1::2], state[1::2])
    q, k, v, beta = (inputs[name].float() for name in ("q", "k", "v", "beta"))
    decay = inputs["g"].exp().reshape(len(q), 1, -1, 1)
    written = state[::2] * decay
    error = beta.unsqueeze(-1) * (v - torch.einsum("nhkv,nhk->nhv", written, k))
    expected = torch.einsum("nhkv,nhk->nhv", written + torch.einsum("nhk,nhv->nhkv", k, error), q) / 8
    assert (o.float() - expected).norm() / expected.norm() <= bound(BF16, "o")


def test_three_hundred_steps_of_a_small_hybrid_stay_in_the_band_of_float32() -> None:
    need_kernel("gated_delta", (64, 64))
    trains_like_float32(torch.device("cuda"), 300)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", ["gated_delta", "kda", "prologue", "epilogue", "decode"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str, op: str) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    need_kernel(op, {"prologue": (64, 64, 4), "epilogue": (64,)}.get(op, (64, 64)))
    # Every tensor has an allocation of its own, so that reading beyond one shows; only our kernels are looked at.
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=stoker"]
    command += [sys.executable, "-m", "tests.kernels.sanitized", op]
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=HOME, env=variables, capture_output=True, text=True, timeout=800)
    said = done.stdout + done.stderr
    if "not supported" in said and "ERROR SUMMARY" not in said:
        pytest.skip(f"compute-sanitizer does not work here: {said.strip().splitlines()[0]}")
    assert done.returncode == 0, said[-4000:]


@pytest.mark.parametrize("op", ["gated_delta", "kda"])
def test_no_slower_than_the_table_in_the_docs(op: str) -> None:
    """Times of the targets' shape, where docs/measurements holds them for this device; a tenth is noise."""
    limit = f"{bench.LIMIT} of {torch.cuda.get_device_name()}"
    row = re.compile(rf"^\| {op} \| {re.escape(str(MAIN))}, (\w+) \| {re.escape(limit)}.*?\| ([\d.]+) \|", re.MULTILINE)
    pages = [path.read_text() for path in sorted((HOME / "docs" / "measurements").glob("bench-kernels*.md"))]
    stored = {phase: float(ms) for page in pages for phase, ms in row.findall(page)}
    if not stored:
        pytest.skip(f"docs/measurements has no times of {op} on {torch.cuda.get_device_name()}")
    rows = bench.rows([bench.Task(op, MAIN, False)], GraphTimer(), bench.Ceilings(1, 1), torch.device("cuda"), 1e12)
    for measured in rows:
        phase = measured.case.rpartition(", ")[2]
        if phase in stored and measured.peer.startswith(limit):
            assert measured.ours_ms is not None and measured.ours_ms <= 1.1 * stored[phase], measured
