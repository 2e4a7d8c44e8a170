"""What a change of a configuration key means for a run that exists, and the keys with their classes. No torch.

A key's class is *identity* (it would be another run: refused), *trajectory* (the curve changes from here on: needs
``run.allow_change``) or *operational* (the curve does not depend on it: free). The class is declared on the field,
``seed: Identity[int]``, and holds for everything below a section.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

from stoker.sections import Section, section_of


class KeyClass(Enum):
    IDENTITY = "identity"
    TRAJECTORY = "trajectory"
    OPERATIONAL = "operational"


T = TypeVar("T")
Identity = Annotated[T, KeyClass.IDENTITY]
Trajectory = Annotated[T, KeyClass.TRAJECTORY]
Operational = Annotated[T, KeyClass.OPERATIONAL]


def keys(model: type[BaseModel], prefix: str = "", inherited: KeyClass | None = None) -> Iterator[tuple[str, KeyClass]]:
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
