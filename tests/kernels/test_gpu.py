"""The CUDA kernels against float64, at the extremes, and bit for bit where they promise bits. `make gpu-check`."""

from __future__ import annotations

import pytest
import torch

from kernels import registry, selfcheck, toolchain
from kernels.bench.problems import delta_problem
from kernels.bench.shapes import Shape
from kernels.cases import Case
from kernels.prologue.op import prologue
from kernels.samples import Decay, cu_seqlens_of, prologue_inputs
from kernels.segment_scan.split import split_delta
from kernels.tolerance import bound, error
from kernels.toolchain.tools import ARCHITECTURES
from tests.kernels import device_checks as checks
from tests.kernels.delta_rules import BF16, F64, RAGGED, RULES, sample
from tests.kernels.device_checks import Runner

pytestmark = pytest.mark.gpu

DIMS = [(64, 64), (64, 128), (128, 64), (128, 128), (128, 192), (128, 256)]
EVERY_LENGTH = tuple(range(1, 131))
#: Implementations that are kernels of ours.
NATIVE = ("cuda", "hopper", "wgmma")


@pytest.fixture(scope="module", autouse=True)
def cuda() -> torch.device:
    """Skips on a GPU that the kernels are not built for; on one that they are built for, their absence is a failure."""
    capability = torch.cuda.get_device_capability()
    if not any(capability in known.capabilities for known in ARCHITECTURES.values()):
        pytest.skip(f"kernels are not built for compute capability {capability}")
    assert toolchain.cuda_library() is not None, toolchain.why_not("cuda")
    return torch.device("cuda")


@pytest.fixture(params=[(rule, name) for rule in RULES for name in NATIVE], ids=lambda of: f"{of[0].op} {of[1]}")
def run(request: pytest.FixtureRequest, cuda: torch.device) -> Runner:
    rule, name = request.param
    if name not in {known.name for known in registry.able(rule.op, cuda, BF16, (128, 128))}:
        pytest.skip(f"{rule.op} has no {name} kernel on this device")
    return Runner(rule, name, cuda)


def test_every_chosen_implementation_passes_selfcheck() -> None:
    rows = selfcheck.check(device="cuda")
    print(selfcheck.table(rows))
    assert all(row.passed for row in rows)
    assert "cuda" in {row.implementation for row in rows}


@pytest.mark.parametrize("decay", ["trained", "none", "extreme"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, (500,)], ids=str)
def test_accurate_for_every_head_and_chunk(
    lengths: tuple[int, ...], heads: tuple[int, int], dims: tuple[int, int], decay: Decay, run: Runner
) -> None:
    checks.accurate(run, lengths, heads, dims, decay)


@pytest.mark.parametrize("seed", range(5))
def test_accurate_for_other_numbers(seed: int, run: Runner) -> None:
    checks.accurate(run, (190, 3), (2, 4), (64, 64), seed=seed + 1)


@pytest.mark.parametrize("kind", checks.KEYS)
def test_keys_at_their_extremes(kind: str, run: Runner) -> None:
    checks.keys_at_extremes(run, kind)


@pytest.mark.parametrize("kind", checks.DECAYS)
def test_decay_at_its_extremes(kind: str, run: Runner) -> None:
    checks.decay_at_extremes(run, kind)


@pytest.mark.parametrize("t", [0, 63, 64, 129])
@pytest.mark.parametrize("name", checks.TOKENS)
def test_no_token_sees_a_later_one(name: str, t: int, run: Runner) -> None:
    checks.causal(run, name, t)


@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_sequences_do_not_touch_each_other(damaged: int, run: Runner) -> None:
    checks.isolated(run, damaged=damaged)


def test_every_length_packed_and_alone(run: Runner) -> None:
    checks.every_length(run, EVERY_LENGTH)


@pytest.mark.parametrize("dims", [(128, 128), (64, 192)], ids=str)
def test_wide_heads_packed_and_alone(dims: tuple[int, int], run: Runner) -> None:
    checks.every_length(run, (1, 63, 64, 65, 130), dims)


def test_columns_of_a_wide_projection(run: Runner) -> None:
    checks.strided(run)


def test_two_calls_chained_by_the_state_equal_one(run: Runner) -> None:
    checks.chained(run)


def test_decoding_goes_on_from_a_prefill(run: Runner) -> None:
    checks.agrees_with_decode(run)


def test_all_of_its_own_memory_is_written_and_no_other(run: Runner) -> None:
    checks.writes_all_of_its_own(run)
    checks.writes_all_of_its_own(run, RAGGED)


def test_closed_form_in_float64_on_the_gpu_is_an_oracle(run: Runner) -> None:
    """For shapes too large for the recurrence on CPU."""
    inputs = run.rule.inputs(RAGGED, (1, 3), (64, 64), F64)
    exact = run.rule.exact(inputs, RAGGED)
    actual = Runner(run.rule, "chunked", run.device)(inputs, RAGGED)
    assert max(error(actual[name], exact[name]) for name in exact) <= 1e-12


@pytest.mark.parametrize("sequences", [4, 1])
def test_accurate_at_a_size_that_fills_the_device(sequences: int, run: Runner) -> None:
    problem = delta_problem(run.rule.op, Shape(8192, sequences, (16, 32)), run.device)
    with registry.force(run.rule.op, "chunked"):
        double = {name: x.detach().double().requires_grad_() for name, x in problem.inputs.items()}
        o, final_state = run.rule.call(**double, cu_seqlens=problem.cu_seqlens)
        generator = torch.Generator(device=run.device).manual_seed(3)
        do = torch.randn(o.shape, generator=generator, device=run.device, dtype=BF16)
        exact = torch.autograd.grad(o, list(double.values()), do.double())
    with registry.force(run.rule.op, run.name):
        o_, final_ = run.rule.call(**problem.inputs, cu_seqlens=problem.cu_seqlens)
        found = torch.autograd.grad(o_, problem.leaves, do)
    named = {f"d{name}": pair for name, pair in zip(problem.inputs, zip(found, exact, strict=True), strict=True)}
    for name, (actual, expected) in {"o": (o_, o), "final_state": (final_, final_state), **named}.items():
        distance = ((actual.double() - expected).norm() / expected.norm()).item()
        print(f"{name} {distance:.1e}")
        assert distance <= bound(BF16, name), (name, distance)


@pytest.mark.parametrize("piece_tokens", [64, 192, 256])
def test_cutting_sequences_costs_no_accuracy(piece_tokens: int, run: Runner) -> None:
    """Exactly the same algebra: no cut, wherever it is, adds more than half to the error of the uncut call."""
    inputs, exact = sample(run.rule, (500, 65), (1, 2), (64, 64), BF16)
    there = {name: x.to(run.device) for name, x in inputs.items()}
    whole = run(inputs, (500, 65), ())
    q, k, v, g, beta, initial = there.values()
    cu_seqlens = cu_seqlens_of((500, 65)).to(run.device)
    with registry.force(run.rule.op, run.name):
        o, final_state = split_delta(q, k, v, g, beta, cu_seqlens, initial, piece_tokens=piece_tokens)
    for name, actual in {"o": o, "final_state": final_state}.items():
        least = 0.1 * bound(BF16, name)
        assert error(actual, exact[name]) <= 1.5 * max(error(whole[name], exact[name]), least), name


def prologue_case(lengths: tuple[int, ...], per_channel: bool) -> Case:
    inputs = prologue_inputs(lengths, (1, 2), (64, 64), BF16, per_channel=per_channel)
    constants = {"cu_seqlens": cu_seqlens_of(lengths), "num_qk_heads": 1}
    return Case("prologue", str(lengths), prologue, inputs, constants, ("q", "k", "v", "g", "beta"), (64, 64, 4))


@pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])
def test_prologue_of_every_length_packed_and_alone(per_channel: bool, cuda: torch.device) -> None:
    """Every sequence's outputs have the same bits in the pack and alone; every output and gradient is accurate."""
    case = prologue_case(EVERY_LENGTH, per_channel)
    if registry.choose("prologue", cuda, BF16, case.shape).name != "cuda":
        pytest.skip("prologue has no CUDA kernel")
    packed = selfcheck.outputs_and_gradients(case, {name: x.to(cuda) for name, x in case.inputs.items()})
    with registry.force("prologue", "reference"):
        exact = selfcheck.outputs_and_gradients(case, {name: x.double() for name, x in case.inputs.items()})
    assert {name: e for name in exact if (e := error(packed[name], exact[name])) > bound(BF16, name)} == {}
    start, tokens = 0, ("q", "k", "v", "a", "b")
    for length in EVERY_LENGTH:
        rows = slice(start, start + length)
        alone = {name: x[rows] if name in tokens else x for name, x in case.inputs.items()}
        cu_seqlens = cu_seqlens_of([length]).to(cuda)
        outputs = prologue(**{name: x.to(cuda) for name, x in alone.items()}, cu_seqlens=cu_seqlens, num_qk_heads=1)
        assert all(torch.equal(x, packed[name][rows]) for name, x in zip(case.outputs, outputs))
        start += length
