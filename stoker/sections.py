"""Sections of YAML files as pydantic models: strict, documented, and refused in a way that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from stoker.errors import Refusal
from stoker.nearest import nearest


class Section(BaseModel):
    """A section of a configuration: frozen, no unknown keys, no silent conversions ("100" is not 100), no NaN.
    The literal under a field is its unit and meaning."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside a field's type (``MoESection | None`` -> MoESection), None for a leaf."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def suggestion(word: str, choices: Sequence[str]) -> str:
    """The end of a refusal about an unknown word: its nearest match, or all there is."""
    match = nearest(word, choices)
    return f"did you mean {match}?" if match else f"known are {', '.join(choices)}"


def refusal(error: ValidationError, model: type[BaseModel], source: str) -> Refusal:
    """One message for everything that is wrong in ``source``: each problem names its key, and says what the key is."""
    problems: dict[tuple[str, str], list[str]] = {}
    for detail in error.errors(include_url=False):
        head, text, meaning = _problem(model, detail["loc"], detail["type"], detail)
        problems.setdefault((head, meaning), []).append(text)
    # The members of a union complain one by one about the same key.
    return Refusal(f"{source}: " + "; ".join(h + " or ".join(texts) + m for (h, m), texts in problems.items()))


def _problem(model: type[BaseModel], loc: tuple[int | str, ...], kind: str, detail: Any) -> tuple[str, str, str]:
    """What is wrong with which key, and the key's meaning if that helps."""
    path: list[str] = []
    section: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for part in loc:
        if section and part in section.model_fields:
            path.append(str(part))
            field = section.model_fields[str(part)]
            section = section_of(field.annotation)
        elif field and (isinstance(part, int) or get_origin(field.annotation) is dict):
            path.append(str(part))  # the rest are pydantic's names for members of a union
    if kind == "extra_forbidden" and section:
        return _unknown(model, section, path, str(loc[-1]))
    key = ".".join(path)
    meaning = f" ({' '.join(field.description.split()).rstrip('.')})" if field and field.description else ""
    if kind == "missing":
        return f"{key} is missing", f": a section with {', '.join(section.model_fields)}" if section else "", meaning
    if kind == "value_error":
        return f"{key}: " if key else "", str(detail["ctx"]["error"]), ""
    return f"{key}={detail['input']!r} ", re.sub(r"^\w+ (?=should )", "", detail["msg"]), meaning


def _unknown(model: type[BaseModel], section: type[BaseModel], path: list[str], word: str) -> tuple[str, str, str]:
    prefix = "".join(f"{part}." for part in path)
    elsewhere = [key for key in _keys(model) if key.rpartition(".")[2] == word]
    choices = [f"{prefix}{name}" for name in section.model_fields]
    advice = f"did you mean {elsewhere[0]}?" if elsewhere else suggestion(f"{prefix}{word}", choices)
    return f"unknown key {prefix}{word}: ", advice, ""


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if inner := section_of(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
