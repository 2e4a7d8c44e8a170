"""What an implementation of a delta rule promises, as functions of the implementation and the device it runs on.

``test_gpu.py`` asks for it all of the CUDA kernels; ``test_device_checks.py`` asks what is cheap of the same kernels on
an emulated thread block, and of the compiled ones on CPU, which proves that the checks themselves run. Inputs and
results are on CPU; the oracle is the token recurrence in float64 on the rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import registry
from kernels.decode.op import decode
from kernels.samples import Decay, cu_seqlens_of
from kernels.tolerance import bound, error
from tests.kernels import small_hybrid
from tests.kernels.delta_rules import BF16, Rule, Tensors, differing, outputs_and_gradients, sample

#: A head, or a chunk of 64 tokens, may be this much further off than all of them together.
PART = 2.0
#: How much further off than the same programs with bfloat16 tiles on the host, which have the same rounding points.
MODEL, MODEL_DIMS = 2.0, (64, 64)
#: Bytes on either side of everything that an implementation allocates, and what they hold.
BAND_BYTES, BAND = 4096, 0xA5
#: Largest relative difference of a bfloat16 run from a float32 one: of the loss, of a gradient's norm, and of the norm
#: for the two weights of the decay, whose few numbers are sums over all tokens that nearly cancel (0.1 on CPU).
LOSS_BAND, NORM_BAND, DECAY_BAND = 3e-2, 3e-2, 0.25
TOKENS = ("q", "k", "v", "g", "beta")


@dataclass(frozen=True)
class Runner:
    """``rule`` by the implementation ``name`` on ``device``."""

    rule: Rule
    name: str
    device: torch.device

    def __call__(self, inputs: Tensors, lengths: Sequence[int], wanted: Sequence[str] | None = None) -> Tensors:
        """Outputs, and gradients of the inputs ``wanted`` (all if None)."""
        with registry.force(self.rule.op, self.name):
            return outputs_and_gradients(self._call, inputs, lengths, BF16, wanted)

    def _call(self, cu_seqlens: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        there = {name: x.to(self.device) for name, x in inputs.items()}
        o, final_state = self.rule.call(**there, cu_seqlens=cu_seqlens.to(self.device))
        return o.cpu(), final_state.cpu()

    def inputs(self, lengths: Sequence[int], heads: tuple[int, int], dims: tuple[int, int], seed: int = 0) -> Tensors:
        return self.rule.inputs(lengths, heads, dims, BF16, seed=seed)


def accurate(
    run: Runner,
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    dims: tuple[int, int],
    decay: Decay = "trained",
    seed: int = 0,
) -> None:
    inputs, exact = sample(run.rule, lengths, heads, dims, BF16, decay, seed)
    judge(run(inputs, lengths), exact)
    if dims == MODEL_DIMS:
        no_worse_than_model(run, inputs, exact, lengths)


def judge(actual: Tensors, exact: Tensors) -> None:
    """Relative L2 of everything, of every head and of every 64 rows; and no element alone is far off: by a 64th of
    itself and 8 times what is admitted of the root of the mean square, at most."""
    failures = []
    for name, expected in exact.items():
        admitted = bound(BF16, name)
        rows = actual[name].split(64), expected.split(64)
        heads = actual[name].unbind(1), expected.unbind(1)
        size = expected.square().mean().sqrt()
        distance = (actual[name].double() - expected).abs()
        found = {
            "whole": error(actual[name], expected) / admitted,
            "head": max(map(error, *heads)) / (PART * admitted),
            "rows": _largest_error(*rows, size) / (PART * admitted),
            "element": (distance / (expected.abs() / 64 + 8 * admitted * size)).max().item(),
        }
        print(name, {kind: f"{share:.2f}" for kind, share in found.items()})
        failures += [
            f"{name}, {kind}: {share:.2f} of what is admitted" for kind, share in found.items() if not share <= 1
        ]
    assert not failures, failures


def _largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor], size: Tensor) -> float:
    """Of parts, each relative to itself, or to a part of the mean ``size`` where it is smaller than a tenth of that."""
    floors = [0.1 * size * x.numel() ** 0.5 for x in expected]
    distances = [(a.double() - x).norm() for a, x in zip(actual, expected)]
    return max((d / torch.maximum(x.norm(), least)).item() for d, x, least in zip(distances, expected, floors))


def no_worse_than_model(run: Runner, inputs: Tensors, exact: Tensors, lengths: Sequence[int]) -> None:
    """Within MODEL times the error of the host's bfloat16 model; its own error counts as a tenth of the bound at least,
    since an error of nothing cannot be doubled."""
    actual, model = run(inputs, lengths), Runner(run.rule, "model", torch.device("cpu"))(inputs, lengths)
    for name, expected in exact.items():
        least = 0.1 * bound(BF16, name)
        ours, models = error(actual[name], expected), error(model[name], expected)
        assert ours <= MODEL * max(models, least), f"{name}: {ours:.1e}, the model {models:.1e}"


def _identical(x: Tensors) -> None:
    x["k"][:] = x["k"][:1]
    x["beta"].fill_(1 - 2**-10)
    x["g"].zero_()


def _alternating(x: Tensors) -> None:
    x["k"][:] = x["k"][:1]
    x["k"][1::2] *= -1


def _orthonormal(x: Tensors) -> None:
    K = x["k"].shape[-1]
    x["k"][:] = torch.eye(K)[torch.arange(len(x["k"])) % K].unsqueeze(1).to(BF16)


def _zero_rows(x: Tensors) -> None:
    x["k"][::3] = 0
    x["q"][::5] = 0


def _long(x: Tensors) -> None:
    """Ten times too long, with a write strength that keeps a step from growing: beta |k|^2 <= 1."""
    x["k"] *= 10
    x["beta"] *= 0.01


def _growing(x: Tensors) -> None:
    """beta in (1, 2): the transition turns a key's direction around."""
    x["beta"][:] = 1 + x["beta"]


#: Name -> changes inputs in place.
KEYS: dict[str, Callable[[Tensors], Any]] = {
    "identical, beta nearly 1": _identical,
    "one key, alternating in sign": _alternating,
    "orthonormal": _orthonormal,
    "zero rows": _zero_rows,
    "ten times too long": _long,
    "beta 0": lambda x: x["beta"].zero_(),
    "beta 1": lambda x: x["beta"].fill_(1),
    "beta above 1": _growing,
}
_STEPS = {"-1e-6": -1e-6, "-5": -5.0, "-20": -20.0, "-100": -100.0, "-1000": -1000.0}
#: Name -> sets g, [N, Hv] or [N, Hv, K], in place.
DECAYS: dict[str, Callable[[Tensor], Any]] = {
    **{name: partial(Tensor.fill_, value=value) for name, value in _STEPS.items()},
    "0": Tensor.zero_,
    "0 and -1000 in turns": lambda g: g.zero_()[::2].fill_(-1000.0),
    "one channel or head 0, the others -1000": lambda g: g.fill_(-1000.0)[..., 0].zero_(),
}


def keys_at_extremes(run: Runner, kind: str, lengths: tuple[int, ...] = (130, 65)) -> None:
    """Against the model, since such inputs may deserve a larger error than usual ones, and finite."""
    inputs = run.inputs(lengths, (1, 2), MODEL_DIMS)
    KEYS[kind](inputs)
    _finite_and_as_the_model(run, inputs, lengths)


def decay_at_extremes(run: Runner, kind: str, lengths: tuple[int, ...] = (130, 65)) -> None:
    """As above. No state grows beyond its bound: what entered it and every value written since, by unit keys."""
    inputs = run.inputs(lengths, (1, 2), MODEL_DIMS)
    DECAYS[kind](inputs["g"])
    final_state = _finite_and_as_the_model(run, inputs, lengths)["final_state"]
    entered = inputs["initial_state"].norm(dim=(2, 3))
    written = torch.stack([v.float().norm(dim=2).sum(0) for v in inputs["v"].split(list(lengths))])
    assert (final_state.norm(dim=(2, 3)) <= entered + written).all()


def _finite_and_as_the_model(run: Runner, inputs: Tensors, lengths: Sequence[int]) -> Tensors:
    actual = run(inputs, lengths)
    assert all(torch.isfinite(x).all() for x in actual.values())
    no_worse_than_model(run, inputs, run.rule.exact(inputs, lengths), lengths)
    return actual


def causal(run: Runner, name: str, t: int, length: int = 130) -> None:
    """Outputs before ``t``, and gradients of a loss on them, keep every bit when an input at ``t`` moves."""

    def before(inputs: Tensors) -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        with registry.force(run.rule.op, run.name):
            o, _ = run._call(cu_seqlens_of([length]), **leaves)
        gradients = torch.autograd.grad(o[:t].float().square().sum(), list(leaves.values()))
        rows = [grad if of == "initial_state" else grad[:t] for of, grad in zip(leaves, gradients)]
        return [o[:t].detach(), *rows]

    inputs = run.inputs([length], (1, 2), (64, 64))
    moved = {key: x.clone() for key, x in inputs.items()}
    moved[name][t] -= 0.7
    assert all(torch.equal(kept, expected) for kept, expected in zip(before(moved), before(inputs)))


def isolated(run: Runner, lengths: tuple[int, ...] = (65, 64, 1, 40), damaged: int = 1) -> None:
    """Whatever one sequence holds, NaN included, every bit of the others' outputs and gradients stays."""
    inputs = run.inputs(lengths, (1, 2), (64, 64))
    expected = run(inputs, lengths)
    start, stop = sum(lengths[:damaged]), sum(lengths[: damaged + 1])
    broken = {name: x.clone() for name, x in inputs.items()}
    for name in TOKENS:
        broken[name][start:stop] = float("nan")
    broken["initial_state"][damaged] = float("nan")
    actual = run(broken, lengths)
    tokens = torch.ones(sum(lengths), dtype=torch.bool)
    tokens[start:stop] = False
    for name, x in actual.items():
        kept = torch.arange(len(lengths)) != damaged if name.endswith("_state") else tokens
        assert torch.equal(x[kept], expected[name][kept]), name


def every_length(run: Runner, lengths: tuple[int, ...], dims: tuple[int, int] = (64, 64)) -> None:
    """Packed, all sequences are accurate; alone, each gives the same bits as in the pack."""
    inputs, exact = sample(run.rule, lengths, (1, 1), dims, BF16)
    packed = run(inputs, lengths, TOKENS)
    judge(packed, {name: exact[name] for name in packed})
    start = 0
    for index, length in enumerate(lengths):
        part, row = slice(start, start + length), slice(index, index + 1)
        alone = {name: x[row if name == "initial_state" else part] for name, x in inputs.items()}
        with _cotangents_of(lengths, part, row, dims):
            found = run(alone, [length], TOKENS)
        expected = {name: x[row if name == "final_state" else part] for name, x in packed.items()}
        assert not differing(found, expected), (length, differing(found, expected))
        start += length


@contextmanager
def _cotangents_of(lengths: Sequence[int], part: slice, row: slice, dims: tuple[int, int]) -> Iterator[None]:
    """The cotangents that a sequence has in the pack, in place of those that it would be given alone."""
    (K, V), generator = dims, torch.Generator().manual_seed(7)
    do = torch.randn((sum(lengths), 1, V), generator=generator, dtype=torch.float64)
    dfinal = torch.randn((len(lengths), 1, K, V), generator=generator, dtype=torch.float64)
    with patch("torch.randn", side_effect=[do[part], dfinal[row]]):
        yield


def strided(run: Runner, lengths: tuple[int, ...] = (65, 30)) -> None:
    """Columns of one wide projection, with NaN in every column and row that is not theirs, give the same bits."""
    inputs = run.inputs(lengths, (1, 2), (64, 64))
    expected = run(inputs, lengths)
    N = sum(lengths)
    wide = torch.full((N + 128, 64 + sum(64 + x[0].numel() for x in (inputs[name] for name in "qkv"))), float("nan"))
    wide, column, views = wide.to(run.device, BF16), 64, {}
    for name in "qkv":
        size = inputs[name][0].numel()
        views[name] = wide[64 : 64 + N, column : column + size].unflatten(1, inputs[name].shape[1:])
        views[name].copy_(inputs[name])
        column += size + 64
    rest = {name: x.to(run.device) for name, x in inputs.items() if name not in views}
    leaves = {name: x.detach().requires_grad_() for name, x in (views | rest).items()}
    with registry.force(run.rule.op, run.name):
        o, final_state = run.rule.call(**leaves, cu_seqlens=cu_seqlens_of(lengths).to(run.device))
    assert torch.equal(o.cpu(), expected["o"]) and torch.equal(final_state.cpu(), expected["final_state"])
    gradients = torch.autograd.grad(o.float().square().sum(), list(leaves.values()))
    assert all(torch.isfinite(grad).all() for grad in gradients)


def chained(run: Runner, length: int = 192, cut: int = 64) -> None:
    """Two calls, the second from the state that the first left, give the bits of one where chunks are cut alike; and
    the recurrence's numbers where they are not."""
    inputs, exact = sample(run.rule, (length,), (1, 2), (64, 64), BF16)
    whole = run(inputs, [length], ())
    for at in (cut, cut + 13):
        first = run({n: x if n == "initial_state" else x[:at] for n, x in inputs.items()}, [at], ())
        rest = {n: first["final_state"] if n == "initial_state" else x[at:] for n, x in inputs.items()}
        second = run(rest, [length - at], ())
        together = {"o": torch.cat((first["o"], second["o"])), "final_state": second["final_state"]}
        if at % 64 == 0:
            assert not differing(together, whole)
        judge(together, {name: exact[name] for name in together})


def writes_all_of_its_own(run: Runner, lengths: tuple[int, ...] = (65, 0, 1, 30)) -> None:
    """With NaN in all memory that it is given, outputs and workspaces included, the same bits; and not a byte beside
    that memory changes."""
    inputs = run.inputs(lengths, (1, 2), (64, 64))
    expected = run(inputs, lengths)
    with banded_memory() as bands:
        actual = run(inputs, lengths)
    assert bands, "nothing was allocated by new_empty: this check sees nothing"
    assert not differing(actual, expected)
    assert all((band == BAND).all() for pair in bands for band in pair)


@contextmanager
def banded_memory() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """``Tensor.new_empty`` gives memory full of NaN between two bands, which are collected."""
    allocate, bands = torch.Tensor.new_empty, []

    def banded(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        of, count = dtype or self.dtype, 1
        for extent in shape:
            count *= extent
        memory = allocate(self, (2 * BAND_BYTES + count * of.itemsize,), dtype=torch.uint8, **others)
        before, body, after = memory.split([BAND_BYTES, count * of.itemsize, BAND_BYTES])
        before.fill_(BAND)
        after.fill_(BAND)
        body.fill_(0xFF)
        bands.append((before, after))
        return body.view(of).view(shape)

    with patch.object(torch.Tensor, "new_empty", banded):
        yield bands


def repeatable(run: Runner, times: int, lengths: tuple[int, ...] = (65, 30), dims: tuple[int, int] = (64, 64)) -> None:
    inputs = run.inputs(lengths, (1, 2), dims)
    expected = run(inputs, lengths)
    for _ in range(times):
        assert not differing(run(inputs, lengths), expected)


def trains_like_float32(device: torch.device, steps: int) -> None:
    """A small hybrid in bfloat16, on the kernels that the registry chooses, against float32 on the closed form in torch
    on CPU: the loss at every step, and every weight's gradient norm at the first."""
    with registry.force("gated_delta", "chunked"), registry.force("kda", "chunked"):
        expected = small_hybrid.train(torch.device("cpu"), torch.float32, steps)
    actual = small_hybrid.train(device, BF16, steps)
    band = max(abs(a - b) / b for a, b in zip(actual.losses, expected.losses))
    norms = {name: abs(actual.gradient_norms[name] / norm - 1) for name, norm in expected.gradient_norms.items()}
    print(
        f"loss {expected.losses[0]:.3f} to {expected.losses[-1]:.3f}, band {band:.1e}, norms {max(norms.values()):.1e}"
    )
    assert band <= LOSS_BAND
    bands = {name: DECAY_BAND if name.endswith(("A_log", "dt_bias")) else NORM_BAND for name in norms}
    assert all(norms[name] <= bands[name] for name in norms), norms


def agrees_with_decode(run: Runner, prefill: int = 100, more: int = 5) -> None:
    """Tokens after a prefill, one by one from its final state, are those of one call over all."""
    inputs, exact = sample(run.rule, (prefill + more,), (1, 2), (64, 64), BF16)
    start = {name: x if name == "initial_state" else x[:prefill] for name, x in inputs.items()}
    state = run(start, [prefill], ())["final_state"].to(run.device)
    outputs = []
    for t in range(prefill, prefill + more):
        q, k, v, g, beta = (inputs[name][t].to(run.device)[None, None] for name in TOKENS)
        outputs.append(decode(q, k, v, g, beta, state)[0, 0])
    assert error(torch.stack(outputs), exact["o"][prefill:]) <= bound(BF16, "o")
    assert error(state, exact["final_state"]) <= bound(BF16, "final_state")
