"""Which implementation of an operator runs: by device, dtype and shape, announced once, and can be forced.

An implementation is a callable with the operator's public signature. The first registered one that supports the call
is taken, so operators register the fastest first and the reference last.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from stoker.errors import Refusal

logger = logging.getLogger(__name__)

#: (device type, dtype, head dims or other static shape of the call) -> can this implementation run it
Supports = Callable[[str, torch.dtype, tuple[int, ...]], bool]


def anywhere(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Runs wherever torch does."""
    return True


@dataclass(frozen=True)
class Implementation:
    """``supports``: is it to be chosen for a call. ``takes``: would it compute the call rightly if it were asked to.
    ``cost``: device type -> what is lost by running there (an implementation absent from it is at home)."""

    name: str
    run: Callable[..., Any]
    supports: Supports = anywhere
    cost: Mapping[str, str] = field(default_factory=dict)
    takes: Supports = anywhere


_implementations: dict[str, list[Implementation]] = {}
_forced: dict[str, str] = {}
_announced: set[tuple[str, str, str, str]] = set()


def register(op: str, implementation: Implementation) -> None:
    _implementations.setdefault(op, []).append(implementation)


def implementations(op: str) -> list[Implementation]:
    """All of an operator, in order of preference. Refusal if the operator is unknown."""
    if op not in _implementations:
        raise Refusal(f"operator {op!r} is unknown: known are {', '.join(sorted(_implementations))}")
    return _implementations[op]


def operators() -> list[str]:
    return sorted(_implementations)


def able(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> list[Implementation]:
    """All that can run a call, in order of preference."""
    return [i for i in implementations(op) if i.supports(device.type, dtype, shape)]


def choose(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Implementation:
    """The implementation to run; says which, once per operator, device and dtype. Can be traced by torch.compile.

    One that was asked for and cannot take this call (bfloat16 only, another device) gives way to the preferred one."""
    sizes = tuple(map(operator.index, shape))  # a size that torch.compile took for a variable is a number from here on
    forced, note = _forced.get(op), ""
    if forced and not _named(op, forced).takes(device.type, dtype, sizes):
        forced, note = None, f"{forced} was asked for and does not take this"
    chosen = _named(op, forced or _preferred(op, device.type, dtype, sizes))
    _announce(op, device.type, str(dtype), chosen.name, note or chosen.cost.get(device.type, ""))
    return chosen


@contextmanager
def force(op: str, name: str) -> Iterator[None]:
    """Within the context every call of ``op`` that the implementation ``name`` takes runs it. Refusal if there is no
    such implementation."""
    _named(op, name)
    before = _forced.get(op)
    _forced[op] = name
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


def prefer(choices: Mapping[str, str]) -> None:
    """From now on run these: {operator: implementation}. Refusal if there is no such operator or implementation."""
    for op, name in choices.items():
        _named(op, name)
    _forced.update(choices)


@torch.compiler.assume_constant_result
def _preferred(op: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Not traced: to know whether it can run, a compiled implementation looks for its library, or builds it."""
    return next(i for i in implementations(op) if i.supports(device, dtype, shape)).name


def _named(op: str, name: str) -> Implementation:
    for implementation in implementations(op):
        if implementation.name == name:
            return implementation
    names = ", ".join(i.name for i in implementations(op))
    raise Refusal(f"operator {op!r} has no implementation {name!r}: choose one of {names}")


@torch.compiler.assume_constant_result
def _announce(op: str, device: str, dtype: str, name: str, cost: str) -> None:
    key = (op, device, dtype, name)
    if key in _announced:
        return
    _announced.add(key)
    level = logging.WARNING if cost else logging.INFO
    logger.log(level, "kernel %s on %s %s: %s%s", op, device, dtype.removeprefix("torch."), name, cost and f" ({cost})")
