"""SWEEP.yaml: what it expands to, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.sweep.definition import StopSection, argument, parse
from pretrain.config_yaml import apply_overrides
from stoker.errors import Refusal

COMMON = {"name": "s", "config": "demo"}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def points(**keys: Any) -> list[dict[str, Any]]:
    return list(parse({**COMMON, **keys}, "sweep.yaml").points())


def test_a_grid_is_every_combination_the_last_key_fastest() -> None:
    assert points(grid={"train.lr": [1, 2], "train.clip": [3, 4, 5]}) == [
        {"train.lr": lr, "train.clip": clip} for lr in (1, 2) for clip in (3, 4, 5)
    ]


def test_zip_walks_together_and_list_grid_zip_and_seeds_multiply() -> None:
    found = points(
        list=[{}, {"train.micro_batch": 2}],
        grid={"train.lr": [1, 2, 3]},
        zip={"model.width": [16, 32], "train.clip": [0.5, 1.0]},
        seeds=[7, 9],
    )
    assert len(found) == 2 * 3 * 2 * 2
    assert found[0] == {"train.lr": 1, "model.width": 16, "train.clip": 0.5, "run.seed": 7}
    assert found[-1] == {
        "train.micro_batch": 2, "train.lr": 3, "model.width": 32, "train.clip": 1.0, "run.seed": 9
    }  # fmt: skip
    assert {(p["model.width"], p["train.clip"]) for p in found} == {(16, 0.5), (32, 1.0)}


def test_a_sweep_of_nothing_is_one_run_and_a_number_of_seeds_counts_from_0() -> None:
    assert points() == [{}]
    assert points(seeds=3) == [{"run.seed": 0}, {"run.seed": 1}, {"run.seed": 2}]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"gird": {}}, "unknown key gird: did you mean grid?"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"zip": {"train.lr": [1, 2], "train.clip": [1]}}, "different numbers of values"),
        ({"grid": {"train.lr": [1]}, "list": [{"train.lr": 2}]}, "train.lr stands in grid and in list"),
        ({"grid": {"run.seed": [1]}, "seeds": 2}, "run.seed stands in grid and in seeds"),
        ({"grid": {"train.lr": []}}, "grid.train.lr"),
        ({"grid": {"train.lr": [1, 1]}}, "train.lr=1 is there twice, as points 1 and 2"),
        ({"grid": {"run.name": ["a"]}}, "run.name is the sweep's own"),
        ({"base": {"train.lr=3": 1}}, "is no key"),
        ({"base": {"train..lr": 1}}, "is no key"),
        ({"grid": {f"train.k{i}": list(range(100)) for i in range(3)}}, "1,000,000 runs"),
        ({"seeds": 0}, "at least 1"),
        ({"metric": {"name": "loss", "mode": "best"}}, "metric.mode"),
        ({"stop": {"factor": 3}}, "stop.first is missing"),
    ],
)
def test_what_is_wrong_is_refused_by_name(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal) as refused:
        points(**keys)
    assert words in str(refused.value)


@given(value=PLAIN)
def test_any_value_is_the_same_after_the_command_line(value: Any) -> None:
    given = argument("section.key", value)
    assert given.isascii() and given.isprintable()
    assert apply_overrides({}, [given]) == {"section": {"key": value}}


@given(first=st.integers(1, 50), factor=st.integers(2, 5), steps=st.integers(1, 5000))
def test_rungs_are_factor_apart_and_below_the_end(first: int, factor: int, steps: int) -> None:
    rungs = StopSection(first=first, factor=factor).rungs(steps)
    assert rungs == [first * factor**k for k in range(len(rungs))] and all(rung < steps for rung in rungs)
    assert first * factor ** len(rungs) >= steps
