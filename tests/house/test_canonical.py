"""One value has one text, and the text gives the value back."""

from __future__ import annotations

import hashlib
import json
import math
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.canonical import dumps, sha256
from stoker.errors import Refusal

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


def same_bits(a: Any, b: Any) -> bool:
    """Equal in type, sign of zero and order; dicts in any order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return a == b


@given(values)
def test_json_read_back_is_the_value_to_the_last_bit(value: Any) -> None:
    assert same_bits(json.loads(dumps(value)), value)


@given(st.dictionaries(st.text(), values), st.randoms())
def test_the_order_in_which_keys_were_set_does_not_show(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert dumps(dict(items)) == dumps(value)
    assert sha256(dict(items)) == hashlib.sha256(dumps(value).encode("ascii")).hexdigest()


class Kind(StrEnum):
    MOE = "moe"


class Level(IntEnum):
    TWO = 2


def test_the_text_is_fixed_for_ever() -> None:
    value = {"b": [1, 0.1, -0.0, 1e22, 5e-324], "a": {"é": True, "": None}, "k": Kind.MOE, "l": Level.TWO, "t": (1,)}
    assert dumps(value) == (r'{"a":{"":null,"\u00e9":true},"b":[1,0.1,-0.0,1e+22,5e-324],"k":"moe","l":2,"t":[1]}')
    assert dumps(np.float64(0.1)) == "0.1"
    assert sha256({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": {"loss": math.nan}}, r"a\.loss: nan"),
        ([0.0, -math.inf], r"\[1\]: -inf"),
        ({"a": [{1: "x"}]}, r"a\[0\]: .*1 is int"),
        ({"a": b"x"}, "a: bytes"),
        ({"a": np.int64(1)}, "a: int64"),
        ({"a": {1, 2}}, "a: set"),
    ],
)
def test_what_json_cannot_say_is_refused_by_key(value: Any, named: str) -> None:
    with pytest.raises(Refusal, match=named):
        dumps(value)


def test_a_number_that_is_not_finite_is_written_when_asked_for() -> None:
    text = dumps({"loss": math.nan, "grad_norm": math.inf}, allow_nan=True)
    read = json.loads(text)
    assert math.isnan(read["loss"]) and read["grad_norm"] == math.inf
