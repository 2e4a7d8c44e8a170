"""Affine pairs, their fold, and the delta rule in parallel pieces: each against the plain recurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import registry
from kernels.gated_delta.reference import gated_delta_reference
from kernels.kda.reference import kda_reference
from kernels.samples import Decay, cu_seqlens_of, gated_delta_inputs
from kernels.segment_scan.fold import two_level
from kernels.segment_scan.op import delta_rule, fold, reverse_fold, segment_fold, segment_pairs
from kernels.segment_scan.pieces import cut_pieces, max_pieces
from kernels.segment_scan.reference import Pair, compose, fold_reference, segment_pairs_reference
from kernels.segment_scan.split import segment_products, split_delta
from kernels.tolerance import bound, error
from stoker.errors import Refusal

WithGradients = Callable[..., dict[str, Tensor]]
F64 = torch.float64
RAGGED = [130, 0, 1, 63, 200, 64, 2]
per_channel = pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])


def samples(
    lengths: Sequence[int],
    heads: tuple[int, int] = (1, 2),
    dims: tuple[int, int] = (8, 5),
    dtype: torch.dtype = F64,
    decay: Decay = "none",
    per_channel: bool = False,
) -> dict[str, Tensor]:
    """As ``gated_delta_inputs``. Where nothing decays beta is small as well: a state outlives hundreds of tokens, the
    first piece is felt in the last."""
    x = gated_delta_inputs(lengths, heads, dims, dtype, decay, per_channel=per_channel)
    if decay == "none":
        x["beta"] *= 0.05
    return x


def sample_pairs(num_pieces: int, heads: int = 2, dims: tuple[int, int] = (4, 3), dtype: torch.dtype = F64) -> Pair:
    """Random pairs; M near a rotation, so that long products neither vanish nor explode."""
    K, V = dims
    generator = torch.Generator().manual_seed(num_pieces)
    M, _ = torch.linalg.qr(torch.randn(num_pieces, heads, K, K, generator=generator, dtype=F64))
    return M.to(dtype), torch.randn(num_pieces, heads, K, V, generator=generator, dtype=F64).to(dtype)


def without_q(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in x.items() if name not in ("q", "initial_state")}


def reference_of(per_channel: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return kda_reference if per_channel else gated_delta_reference


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], admitted: float) -> None:
    errors = {name: error(actual[name], expected[name]) for name in expected}
    print({name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) <= admitted, errors


@per_channel
def test_a_pair_does_to_a_state_what_the_operator_does(per_channel: bool) -> None:
    lengths = [5, 0, 12]
    x = samples(lengths, (2, 4), (3, 5), F64, "trained", per_channel)
    cu_seqlens = cu_seqlens_of(lengths)
    M, B = segment_pairs_reference(**without_q(x), cu_seqlens=cu_seqlens)
    _, final = reference_of(per_channel)(**x, cu_seqlens=cu_seqlens)
    assert error(M @ x["initial_state"] + B, final) <= 1e-14
    assert torch.equal(M[1], torch.eye(3, dtype=F64).expand(4, 3, 3)) and not B[1].any()


@per_channel
def test_reference_gradients_pass_gradcheck(per_channel: bool) -> None:
    x = without_q(samples([3, 2], (1, 2), (3, 2), F64, "trained", per_channel))
    leaves = [value.requires_grad_() for value in x.values()]
    assert torch.autograd.gradcheck(lambda *a: segment_pairs_reference(*a, cu_seqlens_of([3, 2])), leaves)
    folded = [value.requires_grad_() for value in (*sample_pairs(4), torch.randn(3, 2, 4, 3, dtype=F64))]
    first = torch.tensor([0, 3, 3, 4])
    assert torch.autograd.gradcheck(lambda M, B, initial: fold_reference(M, B, first, initial), folded)


@settings(max_examples=30, deadline=None)
@given(dims=st.tuples(st.integers(1, 5), st.integers(1, 5)), heads=st.integers(1, 3))
def test_composition_is_associative_and_has_a_unit(dims: tuple[int, int], heads: int) -> None:
    M, B = sample_pairs(3, heads, dims)
    first, second, third = zip(M, B, strict=True)
    one = torch.eye(dims[0], dtype=F64).expand_as(M[0]), torch.zeros_like(B[0])
    left, right = compose(compose(third, second), first), compose(third, compose(second, first))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, compose(one, first), first)) and all(map(torch.equal, compose(first, one), first))


@per_channel
def test_the_pair_of_a_whole_composes_the_pairs_of_its_parts(per_channel: bool) -> None:
    x = without_q(samples([200], per_channel=per_channel))
    M, B = segment_pairs(**x, cu_seqlens=cu_seqlens_of([77, 123]))
    whole = segment_pairs(**x, cu_seqlens=cu_seqlens_of([200]))
    composed = compose((M[1], B[1]), (M[0], B[0]))
    assert M.norm() > 0.5
    assert all(error(part, total[0]) <= 1e-13 for part, total in zip(composed, whole, strict=True))


@per_channel
@pytest.mark.parametrize(
    "decay, lengths", [("none", [1]), ("none", RAGGED), ("trained", RAGGED), ("extreme", [65, 0, 20])], ids=str
)
def test_pairs_through_the_operator_equal_composed_tokens(
    decay: Decay, lengths: list[int], per_channel: bool, with_gradients: WithGradients, poisoned_memory: None
) -> None:
    """float64: M, B and the gradients of k, v, g, beta within 1e-12."""
    x = without_q(samples(lengths, (2, 4), (8, 5), F64, decay, per_channel))
    cu_seqlens = cu_seqlens_of(lengths)
    expected = with_gradients(segment_pairs_reference, x, cu_seqlens)
    assert_close(with_gradients(segment_pairs, x, cu_seqlens), expected, 1e-12)


@per_channel
def test_pairs_of_bfloat16_inputs_are_exact_in_float32(per_channel: bool) -> None:
    """M is multiplied with itself along a sequence: rounding it to bfloat16 would cost 3 digits a piece."""
    x = without_q(samples(RAGGED, (1, 2), (16, 16), torch.bfloat16, "none", per_channel))
    cu_seqlens = cu_seqlens_of(RAGGED)
    actual = segment_pairs(**x, cu_seqlens=cu_seqlens)
    expected = segment_pairs_reference(**{name: value.double() for name, value in x.items()}, cu_seqlens=cu_seqlens)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32 and error(ours, exact) <= bound(torch.float32, "*")


@given(lengths=st.lists(st.just(0) | st.integers(1, 40), min_size=1, max_size=9), size=st.integers(1, 12))
def test_pieces_tile_every_sequence_in_order(lengths: list[int], size: int) -> None:
    cu_seqlens = cu_seqlens_of(lengths)
    pieces = cut_pieces(cu_seqlens, sum(lengths), size)
    bounds, first = pieces.bounds.tolist(), pieces.first.tolist()
    assert pieces.bounds.dtype == pieces.first.dtype == cu_seqlens.dtype
    assert len(bounds) - 1 == first[-1] == max_pieces(sum(lengths), len(lengths), size)
    for (start, stop), (lo, hi) in zip(pairwise(cu_seqlens.tolist()), pairwise(first), strict=True):
        cuts = [*range(start, stop, size), stop]
        assert hi > lo and bounds[lo : lo + len(cuts)] == cuts
        assert set(bounds[lo + len(cuts) : hi + 1]) <= {stop}


@pytest.mark.parametrize("bounds", [[0, 5], [1, 7], [0, 5, 3, 7], [0, 9, 7], [0, 99, 7, 7]], ids=str)
def test_boundaries_that_do_not_cover_the_tokens_are_refused(bounds: list[int]) -> None:
    """Cutting does not repair what is wrong."""
    x = samples([7 * 20])
    del x["initial_state"]
    with pytest.raises(Refusal, match="must rise from 0 to the number of packed tokens, 140"):
        split_delta(**x, cu_seqlens=20 * torch.tensor(bounds), piece_tokens=64)
    with pytest.raises(Refusal, match="must rise from 0 to the number of packed tokens, 140"):
        split_delta(**x, cu_seqlens=torch.tensor([140]), piece_tokens=64)


@pytest.mark.parametrize("implementation", ["sequential", "two_level"])
@pytest.mark.parametrize("first", [[0, 2], [0, 7], [0, 3, 3, 4, 13], [0, 0, 5, 5]], ids=str)
def test_fold_equals_the_plain_loop(implementation: str, first: list[int], with_gradients: WithGradients) -> None:
    """float64: entering and final states and the gradients of M, B and the initial state."""
    M, B = sample_pairs(first[-1])
    initial = torch.randn(len(first) - 1, 2, 4, 3, dtype=F64)

    def run(call: Callable[..., tuple[Tensor, Tensor]], cu_seqlens: Tensor, **x: Tensor) -> tuple[Tensor, Tensor]:
        return call(first=cu_seqlens, **x)

    for x in ({"M": M, "B": B, "initial": initial}, {"M": M, "B": B}):
        expected = with_gradients(partial(run, fold_reference), x, torch.tensor(first))
        with registry.force("segment_fold", implementation):
            assert_close(with_gradients(partial(run, fold), x, torch.tensor(first)), expected, 1e-13)


def test_a_sequence_without_pieces_keeps_its_state() -> None:
    (M, B), initial = sample_pairs(0), torch.randn(2, 2, 4, 3, dtype=F64)
    for implementation in ("sequential", "two_level", "reference"):
        with registry.force("segment_fold", implementation):
            entering, final = fold(M, B, torch.tensor([0, 0, 0]), initial)
        assert entering.shape == B.shape and torch.equal(final, initial)


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=6), block=st.integers(1, 8))
def test_blocks_of_any_size_fold_alike(counts: list[int], block: int) -> None:
    M, B = sample_pairs(sum(counts))
    first, initial = cu_seqlens_of(counts), torch.ones(len(counts), 2, 4, 3, dtype=F64)
    for actual, expected in zip(two_level(M, B, first, initial, block), fold_reference(M, B, first, initial)):
        assert error(actual, expected) <= 1e-13


def test_fold_of_many_pieces_in_float32_stays_within_its_bound() -> None:
    M, B = sample_pairs(300, dtype=torch.float32)
    first = torch.tensor([0, 299, 300])
    exact = fold_reference(M.double(), B.double(), first)
    for implementation in ("sequential", "two_level"):
        with registry.force("segment_fold", implementation):
            errors = [error(actual, expected) for actual, expected in zip(fold(M, B, first), exact)]
        assert max(errors) <= bound(torch.float32, "*"), errors


def test_sequences_fold_as_if_alone() -> None:
    """Bitwise, whatever the others hold."""
    M, B = sample_pairs(9, dtype=torch.float32)
    M[4] = torch.nan
    entering, final = fold(M, B, torch.tensor([0, 4, 5, 9]))
    for sequence, (start, stop) in enumerate([(0, 4), (4, 5), (5, 9)]):
        alone = fold(M[start:stop], B[start:stop], torch.tensor([0, stop - start]))
        if sequence != 1:
            assert torch.equal(entering[start:stop], alone[0]) and torch.equal(final[sequence], alone[1][0])


def test_reverse_fold_is_the_transpose_of_fold() -> None:
    """<fold(B, initial), (c, d)> = <(B, initial), reverse_fold(c, d)>: fold is linear in B and initial."""
    first = torch.tensor([0, 5, 6, 6])
    (M, B), (_, c) = sample_pairs(6), sample_pairs(6)
    initial, d = torch.randn(2, 3, 2, 4, 3, dtype=F64)
    entering, final = fold(M, B, first, initial)
    dleaving, dinitial = reverse_fold(M, c, first, d)
    left, right = (entering * c).sum() + (final * d).sum(), (B * dleaving).sum() + (initial * dinitial).sum()
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("first", [[0, 3], [1, 4], [0, 3, 2, 4], [4]], ids=str)
def test_pieces_that_do_not_make_up_the_sequences_are_refused(first: list[int]) -> None:
    with pytest.raises(Refusal, match="must rise from 0 to the number of pieces, 4"):
        fold(*sample_pairs(4), torch.tensor(first))


def test_pairs_that_lost_precision_or_shape_are_refused() -> None:
    (M, B), first = sample_pairs(4, dtype=torch.float32), torch.tensor([0, 4])
    with pytest.raises(Refusal, match=r"M is torch.bfloat16 and B is torch.float32"):
        fold(M.bfloat16(), B, first)
    with pytest.raises(Refusal, match=r"float32 or float64 alike"):
        fold(M.bfloat16(), B.bfloat16(), first)
    with pytest.raises(Refusal, match=r"M has shape \(3, 2, 4, 4\)"):
        fold(M[:3], B, first)
    with pytest.raises(Refusal, match=r"initial has shape \(2, 2, 4, 3\)"):
        fold(M, B, first, B[:2])


@per_channel
@pytest.mark.parametrize(
    "decay, lengths",
    [("none", [65]), ("none", [500]), ("none", RAGGED), ("trained", RAGGED), ("extreme", RAGGED)],
    ids=str,
)
def test_pieces_equal_the_whole(
    decay: Decay, lengths: list[int], per_channel: bool, with_gradients: WithGradients, poisoned_memory: None
) -> None:
    """float64: outputs, states and every gradient within 1e-12 of the token recurrence, for every cut."""
    x = samples(lengths, (2, 4), (8, 5), F64, decay, per_channel)
    cu_seqlens = cu_seqlens_of(lengths)
    expected = with_gradients(reference_of(per_channel), x, cu_seqlens)
    for piece_tokens in (64, 192):
        actual = with_gradients(partial(split_delta, piece_tokens=piece_tokens), x, cu_seqlens)
        assert_close(actual, expected, 1e-12)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 63, 64, 65, 150]), min_size=1, max_size=5),
    chunks=st.integers(1, 4),
    per_channel=st.booleans(),
    fold_by=st.sampled_from(["sequential", "two_level", "reference"]),
)
def test_pieces_equal_the_whole_wherever_sequences_end(
    lengths: list[int], chunks: int, per_channel: bool, fold_by: str
) -> None:
    """No initial state, a scale that is not the default, float64."""
    x = samples(lengths, (1, 1), (4, 3), F64, "none", per_channel)
    del x["initial_state"]
    leaves = {name: value.requires_grad_() for name, value in x.items()}

    def results(implementation: str) -> dict[str, Tensor]:
        with registry.force("split_delta", implementation):
            o, final = split_delta(**leaves, cu_seqlens=cu_seqlens_of(lengths), scale=0.7, piece_tokens=64 * chunks)
        loss = (o.cumsum(0) + final.sum()).sin().sum() + final.square().sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return {"o": o, "final": final, **dict(zip(x, gradients, strict=True))}

    with registry.force("segment_fold", fold_by):
        actual = results("pieces")
    expected = results("reference")
    assert max(error(actual[name], expected[name]) for name in expected) <= 1e-12


@per_channel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_stay_within_the_bounds_of_the_whole(
    dtype: torch.dtype, per_channel: bool, with_gradients: WithGradients
) -> None:
    x = samples([257, 65], (1, 2), (16, 16), dtype, "none", per_channel)
    cu_seqlens = cu_seqlens_of([257, 65])
    actual = with_gradients(partial(split_delta, piece_tokens=64), x, cu_seqlens)
    exact = {name: value.double() for name, value in x.items()}
    assert actual["output 0"].dtype == actual["dq"].dtype == dtype
    # Twice the bound: here the cotangents are rounded to the dtype as well.
    assert_close(actual, with_gradients(reference_of(per_channel), exact, cu_seqlens), 2 * bound(dtype, "*"))


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("t", [63, 64, 200])
def test_no_token_sees_a_later_one(name: str, t: int) -> None:
    """Outputs before ``t``, and gradients of a loss on them, keep every bit when an input at ``t`` moves, though later
    pieces ran at the same time."""

    def before(x: dict[str, Tensor]) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in x.values()]
        o, _ = split_delta(*leaves[:5], cu_seqlens_of([330]), leaves[5], piece_tokens=128)
        gradients = torch.autograd.grad(o[:t].square().sum(), leaves)
        return [o[:t], *(grad[:t] for grad in gradients[:5]), gradients[5]]

    x = samples([330], dims=(8, 8), dtype=torch.float32)
    moved = {key: value.clone() for key, value in x.items()}
    moved[name][t] -= 0.7
    for kept, expected in zip(before(moved), before(x), strict=True):
        assert torch.equal(kept, expected)


def test_sequences_do_not_touch_each_other(with_gradients: WithGradients) -> None:
    """Whatever one sequence holds, NaN included, every bit of the others' outputs and gradients stays."""
    cu_seqlens, call = cu_seqlens_of(RAGGED), partial(split_delta, piece_tokens=64)
    x = samples(RAGGED, dims=(8, 8), dtype=torch.float32)
    expected = with_gradients(call, x, cu_seqlens)
    for damaged in (0, 4, 6):
        start, stop = cu_seqlens[damaged], cu_seqlens[damaged + 1]
        broken = {name: value.clone() for name, value in x.items()}
        for name in ("q", "k", "v", "g", "beta"):
            broken[name][start:stop] = torch.nan
        broken["initial_state"][damaged] = torch.nan
        token = torch.ones(sum(RAGGED), dtype=torch.bool)
        token[start:stop] = False
        for key, value in with_gradients(call, broken, cu_seqlens).items():
            kept = token if len(value) == len(token) else torch.arange(len(RAGGED)) != damaged
            assert torch.equal(value[kept], expected[key][kept]), key


def test_only_gradients_that_are_asked_for_are_given(with_gradients: WithGradients) -> None:
    """Every single input as the only one that requires a gradient: the same bits as with all of them."""
    x, cu_seqlens = samples([150, 20]), cu_seqlens_of([150, 20])
    for name in x:
        leaves = {key: value.clone().requires_grad_() for key, value in x.items()}
        one = {key: value if key == name else value.detach() for key, value in leaves.items()}
        gradients = []
        for given_inputs in (leaves, one):
            o, final = split_delta(**given_inputs, cu_seqlens=cu_seqlens, piece_tokens=64)
            gradients += torch.autograd.grad(o.sin().sum() + final.sin().sum(), leaves[name])
        assert torch.equal(*gradients), name


def test_compiled_whole_equals_eager(with_gradients: WithGradients) -> None:
    """One graph: no branch on data in forward or backward."""
    x, cu_seqlens = samples(RAGGED, dtype=torch.float32, per_channel=True), cu_seqlens_of(RAGGED)
    call = partial(split_delta, piece_tokens=64)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual = with_gradients(compiled, x, cu_seqlens)
    for name, expected in with_gradients(call, x, cu_seqlens).items():
        assert torch.equal(actual[name], expected), name


def test_operators_pass_opcheck() -> None:
    first = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    M, B = (value.requires_grad_() for value in sample_pairs(4))
    initial = torch.randn(3, 2, 4, 3, dtype=F64, requires_grad=True)
    torch.library.opcheck(segment_fold, (M, B, first, initial, None))
    torch.library.opcheck(segment_fold, (M, B, first, None, 2))
    torch.library.opcheck(segment_products, (torch.randn(9, 2, 3), torch.randn(9, 2, 4), torch.tensor([0, 2, 9])))


def test_sequences_no_longer_than_a_piece_are_not_cut() -> None:
    """The same bits as the operator alone."""
    x, cu_seqlens = samples([60, 4], dtype=torch.float32), cu_seqlens_of([60, 4])
    uncut = delta_rule(**x, cu_seqlens=cu_seqlens)
    assert all(map(torch.equal, split_delta(**x, cu_seqlens=cu_seqlens, piece_tokens=64), uncut))


@pytest.mark.parametrize("piece_tokens", [0, -64, 63, 100])
def test_cuts_inside_chunks_are_refused(piece_tokens: int) -> None:
    with pytest.raises(Refusal, match=f"piece_tokens={piece_tokens} must be a positive multiple of 64"):
        split_delta(**samples([200]), cu_seqlens=cu_seqlens_of([200]), piece_tokens=piece_tokens)
