"""Where a number first is not finite: in which weight, module or gradient, and on which rank.

One step's forward and backward is run under ``Examination``, which looks at every weight before, at the output of every
module, and at every gradient before ranks add theirs. Of all ranks' findings the earliest counts: weights before the
forward pass, that from the embedding to the loss, then the backward pass from the loss to the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from pretrain.trainer import Trainer

#: What is looked at, in the order in which it is computed.
WHAT = ("weight", "output", "loss", "gradient")
#: Depth of what comes behind the last layer.
_END = 10**6


@dataclass(frozen=True)
class First:
    """``what`` of ``name`` was the first that is not finite, on ``rank`` alone (None: on several, or on none)."""

    what: str
    name: str
    rank: int | None
    ranks: tuple[int, ...] = ()


class Examination:
    """Looks at this rank while it is entered; ``first`` is then [order, what, name] of the earliest, or None."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._found: list[tuple[tuple[int, ...], str, str]] = []
        self._order: dict[nn.Module, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Examination:
        for name, tensor in (*self._trainer.parameters.items(), *self._trainer.state.items()):
            self._look(tensor, "weight", name, (_depth(name),))
        names = {parameter: name for name, parameter in self._trainer.parameters.items()}
        for chunk in self._trainer.chunks:
            for module in chunk.modules():
                if held := [names[parameter] for parameter in module.parameters() if parameter in names]:
                    # A tied head holds the embedding's weight and stands at the other end.
                    name, depth = ("head", _END) if module is chunk.head else (_common(held), _depth(_common(held)))
                    self._hooks.append(module.register_forward_hook(self._seen(name, depth)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, name: str, depth: int) -> Any:
        def seen(module: nn.Module, inputs: Any, output: Any) -> None:
            # Inner modules end before the ones around them, in every micro-batch alike.
            order = self._order.setdefault(module, len(self._order))
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, torch.Tensor):
                    self._look(tensor, "output", name, (depth, order))

        return seen

    def look_at_gradients(self, losses: Sequence[torch.Tensor]) -> None:
        """After backward, before gradients are reduced."""
        for loss in losses:
            self._look(loss, "loss", "the loss", (0,))
        for index, (name, parameter) in enumerate(self._trainer.parameters.items()):
            self._look(parameter.main_grad, "gradient", name, (-_depth(name), -index))  # type: ignore[attr-defined]

    def _look(self, tensor: torch.Tensor, what: str, name: str, place: tuple[int, ...]) -> None:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            self._found.append(((WHAT.index(what), *place), what, name))

    @property
    def first(self) -> list[Any] | None:
        if not self._found:
            return None
        order, what, name = min(self._found)
        return [list(order), what, name]


def located(found: Sequence[Any]) -> First:
    """The earliest of every rank's ``Examination.first``, by rank."""
    earliest = min((item for item in found if item is not None), default=None)
    if earliest is None:
        return First("", "", None)
    ranks = tuple(rank for rank, item in enumerate(found) if item == earliest)
    return First(earliest[1], earliest[2], ranks[0] if len(ranks) == 1 else None, ranks)


def in_words(first: First) -> str:
    if not first.what:
        return "what every rank computed alone is, so it arose where ranks add their numbers up"
    where = f"on rank {first.ranks[0]}" if len(first.ranks) == 1 else f"on ranks {', '.join(map(str, first.ranks))}"
    subject = first.name if first.what == "loss" else f"the {first.what} of {first.name}"
    return f"{where} {subject} was the first"


def _depth(name: str) -> int:
    """Place of a global name between embedding and loss."""
    parts = name.split(".")
    if parts[0] == "embed":
        return -1
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 1 else _END


def _common(names: Sequence[str]) -> str:
    """The global name of a module from those of the tensors in it."""
    if len(names) == 1:
        return names[0]
    shared = []
    for parts in zip(*(name.split(".") for name in names)):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or "the model"
