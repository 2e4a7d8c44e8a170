"""What every configuration section shares: strictness, key classes, and refusals a person can act on. No torch.

A key's class says what a change means for a run that exists: *identity* (it would be another run: refused),
*trajectory* (the curve changes from here on: needs ``run.allow_change``) or *operational* (the curve does not depend on
it: free). The class is declared on the field, ``seed: Identity[int]``, and holds for everything below a section.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from stoker.errors import Refusal
from stoker.nearest import nearest


class KeyClass(Enum):
    IDENTITY = "identity"
    TRAJECTORY = "trajectory"
    OPERATIONAL = "operational"


T = TypeVar("T")
Identity = Annotated[T, KeyClass.IDENTITY]
Trajectory = Annotated[T, KeyClass.TRAJECTORY]
Operational = Annotated[T, KeyClass.OPERATIONAL]


class Section(BaseModel):
    """A section of the configuration: frozen, no unknown keys, no silent conversions ("100" is not 100), no NaN.
    The literal under a field is its unit and meaning."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def section_of(annotation: Any) -> type[Section] | None:
    """The section inside a field's type (``MoESection | None`` -> MoESection), None for a leaf."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def keys(model: type[Section], prefix: str = "", inherited: KeyClass | None = None) -> Iterator[tuple[str, KeyClass]]:
    """Every leaf key of a section with its class: ("train.lr", KeyClass.TRAJECTORY)."""
    for name, field in model.model_fields.items():
        key_class = next((m for m in field.metadata if isinstance(m, KeyClass)), inherited)
        if inner := section_of(field.annotation):
            yield from keys(inner, f"{prefix}{name}.", key_class)
        elif key_class is None:
            raise TypeError(f"field {prefix}{name} of {model.__name__} declares no key class")
        else:
            yield f"{prefix}{name}", key_class


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf key with its value; a section that is not given (None, "auto") is a leaf itself."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def suggestion(word: str, choices: Sequence[str]) -> str:
    """The end of a refusal about an unknown word: its nearest match, or all there is."""
    match = nearest(word, choices)
    return f"did you mean {match}?" if match else f"known are {', '.join(choices)}"


def refusal(error: ValidationError, model: type[Section], source: str) -> Refusal:
    """One message for everything that is wrong in ``source``: each problem names its key, and says what the key is."""
    problems: dict[tuple[str, str], list[str]] = {}
    for detail in error.errors(include_url=False):
        head, text, meaning = _problem(model, detail["loc"], detail["type"], detail)
        problems.setdefault((head, meaning), []).append(text)
    # The members of a union complain one by one about the same key.
    return Refusal(f"{source}: " + "; ".join(h + " or ".join(texts) + m for (h, m), texts in problems.items()))


def _problem(model: type[Section], loc: tuple[int | str, ...], kind: str, detail: Any) -> tuple[str, str, str]:
    """What is wrong with which key, and the key's meaning if that helps."""
    path: list[str] = []
    section: type[Section] | None = model
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


def _unknown(model: type[Section], section: type[Section], path: list[str], word: str) -> tuple[str, str, str]:
    prefix = "".join(f"{part}." for part in path)
    elsewhere = [key for key, _ in keys(model) if key.rpartition(".")[2] == word]
    choices = [f"{prefix}{name}" for name in section.model_fields]
    advice = f"did you mean {elsewhere[0]}?" if elsewhere else suggestion(f"{prefix}{word}", choices)
    return f"unknown key {prefix}{word}: ", advice, ""
