"""``section.key=value`` overrides of a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stoker.errors import Refusal
from stoker.yaml_core import parse_yaml


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``values`` with each ``section.key=value`` set, the value read as YAML; sections on the way are created.

    A scalar on the way gives way to the section: ``parallel.tp=2`` turns ``parallel: auto`` into ``{tp: 2}``.
    """
    result = dict(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise Refusal(f"override {override!r} is not of the form section.key=value, for example train.lr=3e-4")
        _set(result, path, parse_yaml(text, f"override {override!r}"))
    return result


def _set(section: dict[str, Any], path: list[str], value: Any) -> None:
    head, *rest = path
    if not rest:
        section[head] = value
        return
    inner = section.get(head)
    section[head] = dict(inner) if isinstance(inner, Mapping) else {}
    _set(section[head], rest, value)
