"""Runs as global values, whatever their layout, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.health import StepReport
from tests.parity.jobs import Held, Outcome


@dataclass(frozen=True)
class Run:
    """Reports of the steps, and every tensor of the state made whole. ``drifted``: tensors whose replicas differ from
    their owner in any bit."""

    reports: list[StepReport]
    tensors: dict[str, np.ndarray]
    drifted: list[str]


def assemble(outcomes: Sequence[Outcome]) -> Run:
    """The global run of all ranks. Owners must tile every tensor exactly once; every rank must report the same."""
    reports = outcomes[0].reports
    for rank, outcome in enumerate(outcomes):
        assert repr(outcome.reports) == repr(reports), f"rank {rank} reports other values than rank 0"
    tensors: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for held, box, content in _pieces(outcomes, owner=True):
        whole = tensors.setdefault(held.name, np.zeros(held.layout.shape))
        count = seen.setdefault(held.name, np.zeros(held.layout.shape, int))
        whole[box] = content
        count[box] += 1
    for name, count in seen.items():
        assert (count == 1).all(), f"{name}: elements are owned {count.min()} to {count.max()} times"
    replicas = _pieces(outcomes, owner=False)
    drifted = {held.name for held, box, content in replicas if not np.array_equal(tensors[held.name][box], content)}
    return Run(reports, tensors, sorted(drifted))


def _pieces(outcomes: Sequence[Outcome], owner: bool) -> Iterator[tuple[Held, tuple[slice, ...], np.ndarray]]:
    for held in (held for outcome in outcomes for held in outcome.held if held.owner == owner):
        for piece, content in held.pieces:
            box = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
            yield held, box, content.reshape(piece.shape)


@dataclass(frozen=True)
class Difference:
    """Two runs apart, the worst of all steps or tensors. ``loss``, ``norm`` and ``aux`` relative; ``tensors``:
    max|d| / max|w| of a tensor, weights and optimizer moments alike, with the name of the worst; ``same_load``: every
    expert got the same number of tokens in every step."""

    loss: float
    norm: float
    aux: float
    tensors: float
    worst_tensor: str
    same_load: bool
    drifted: list[str]

    def beyond(self, *, loss: float, norm: float, aux: float, tensors: float) -> list[str]:
        """What is further apart than these bounds, NaN included; empty if the runs agree."""
        bounds = {"loss": loss, "norm": norm, "aux": aux, "tensors": tensors}
        measured = {key: getattr(self, key) for key in bounds}
        found = [
            f"{key} {value:.1e} > {bounds[key]:.0e}" for key, value in measured.items() if not value <= bounds[key]
        ]
        if not self.same_load:
            found.append("expert loads differ")
        return found + [f"replicas of {name} differ" for name in self.drifted]

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.1e}  norm {self.norm:.1e}  aux {self.aux:.1e}  "
            f"tensors {self.tensors:.1e} ({self.worst_tensor})"
        )


#: The fixture ``compare(spec, plan, steps, mutation=None, name="")``: a float64 run under the plan against one process;
#: with a name, it is told at the end of the session.
Compare = Callable[..., Difference]


def difference(run: Run, reference: Run) -> Difference:
    assert run.tensors.keys() == reference.tensors.keys()
    pairs = list(zip(run.reports, reference.reports, strict=True))
    by_tensor = {name: _apart(whole, reference.tensors[name]) for name, whole in run.tensors.items()}
    worst = max(by_tensor, key=lambda name: _rank(by_tensor[name]))
    return Difference(
        loss=_worst(_relative(a.loss, b.loss) for a, b in pairs),
        norm=_worst(_relative(a.grad_norm, b.grad_norm) for a, b in pairs),
        aux=_worst([0.0, *(_relative(a.aux[key], b.aux[key]) for a, b in pairs for key in b.aux)]),
        tensors=by_tensor[worst],
        worst_tensor=worst,
        same_load=all(a.load == b.load for a, b in pairs),
        drifted=run.drifted,
    )


def _relative(value: float, reference: float) -> float:
    return 0.0 if value == reference else abs(value - reference) / abs(reference) if reference else float("inf")


def _apart(tensor: np.ndarray, reference: np.ndarray) -> float:
    apart, largest = float(np.abs(tensor - reference).max()), float(np.abs(reference).max())
    return 0.0 if apart == 0.0 else apart / largest if largest else float("inf")


def _rank(value: float) -> float:
    return float("inf") if np.isnan(value) else value


def _worst(values: Iterator[float] | Sequence[float]) -> float:
    return max(values, key=_rank)
