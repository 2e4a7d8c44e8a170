"""The words of a chart: each can be read, and no two are the same."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from pretrain.figures.chart import BOTTOM, LOW, NARROW, TALL, WIDE, Line, line_chart, tick_label, ticks

FONT = FontProperties(family="DejaVu Sans")


def below(first: int, last: int, wide: bool) -> list[tuple[float, float, str]]:
    """The words under the axis of steps, from left to right: where each begins and ends, in pixels."""
    steps = np.unique(np.linspace(first, last, 50).round())
    svg = line_chart([Line.of("loss", "c0", steps, np.ones(len(steps)))], wide=wide)
    found = []
    for text in svg.iter("text"):
        if float(text.get("y", 0)) > (TALL if wide else LOW) - BOTTOM:
            assert text.text is not None
            width = TextPath((0, 0), text.text, size=12, prop=FONT).get_extents().width
            at = float(text.get("x", 0))
            start = at - {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor", "start")]
            found.append((start, start + width, text.text))
    return sorted(found)


@given(st.integers(0, 3_000_000), st.integers(0, 6), st.integers(1, 69), st.booleans())
def test_steps_under_a_chart_do_not_overlap_wherever_the_curve_begins(
    first: int, power: int, times: int, wide: bool
) -> None:
    words = below(first, first + times * 10**power // 10, wide)
    assert words[0][2] == "step"
    assert all(end + 2 < start for (_, end, _), (start, _, _) in pairwise(words)), words
    assert words[0][0] >= 0 and words[-1][1] <= (WIDE if wide else NARROW), words
    assert len({word for _, _, word in words}) == len(words)


@pytest.mark.parametrize(("low", "high"), [(1e6, 1.004e6), (2e-5, 2.03e-5), (-3.2e7, -3.1e7), (0.5, 2.0)])
def test_marks_of_an_axis_have_labels_of_their_own(low: float, high: float) -> None:
    labels = [tick_label(tick) for tick in ticks(low, high, 5)]
    assert len(set(labels)) == len(labels) >= 3, labels
