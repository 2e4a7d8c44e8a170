"""One text for one value: JSON that two machines write to the same byte, and so can be hashed and compared."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from stoker.errors import Refusal


def dumps(value: Any, allow_nan: bool = False) -> str:
    """Canonical JSON: keys sorted, no spaces, ASCII only, floats as the shortest text that reads back to the same bits.

    Takes dict (str keys), list, tuple, str, int, float, bool and None; tuples come back as lists. Refuses the rest,
    and NaN and infinities (not JSON, read by Python all the same) unless `allow_nan`, naming the key.

    >>> dumps({"b": 0.1, "a": [1, None]})
    '{"a":[1,null],"b":0.1}'
    """
    _check(value, "", allow_nan)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=allow_nan)


def sha256(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()


def _check(value: Any, key: str, allow_nan: bool) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise Refusal(f"{key or 'top level'}: JSON keys are text, and {name!r} is {type(name).__name__}")
            _check(item, f"{key}.{name}" if key else name, allow_nan)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{key}[{index}]", allow_nan)
    elif isinstance(value, float):
        if not (allow_nan or math.isfinite(value)):
            raise Refusal(f"{key or 'value'}: {value} has no place in JSON; write null for a number that is not known")
    elif not (value is None or isinstance(value, str | int)):
        raise Refusal(f"{key or 'value'}: {type(value).__name__} is not JSON; convert it before it is written")
