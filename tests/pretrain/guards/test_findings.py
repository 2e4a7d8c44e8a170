"""guards.jsonl: what the guards found, a line each, read back as written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pretrain.guards.findings import GUARDS, Finding, read, write
from stoker.errors import Refusal


def test_a_finding_is_read_back_whatever_its_numbers(tmp_path: Path) -> None:
    write(tmp_path, 2, Finding(7, "slow", "rank 1 takes 1.42 times the work time of its peers", 1, {"ratio": 1.42}))
    write(tmp_path, 2, Finding(8, "nonfinite", "the loss is not", None, {"loss": math.nan}))
    slow, nonfinite = read(tmp_path)
    assert (slow["step"], slow["kind"], slow["rank"], slow["attempt"], slow["ratio"]) == (7, "slow", 1, 2, 1.42)
    assert nonfinite["rank"] is None and nonfinite["loss"] == "nan"
    assert all(json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / GUARDS).read_text().splitlines())


def test_a_run_without_findings_has_none(tmp_path: Path) -> None:
    assert read(tmp_path) == []


def test_p7_a_newer_line_is_refused_by_its_number_and_an_unknown_kind_is_not_written(tmp_path: Path) -> None:
    write(tmp_path, 1, Finding(0, "spike", "the loss is 9"))
    with open(tmp_path / GUARDS, "a", encoding="utf-8") as file:
        file.write('{"schema": 2}\n')
    with pytest.raises(Refusal, match=f"{GUARDS}, line 2: schema 2"):
        read(tmp_path)
    with pytest.raises(ValueError, match="'odd' is none of"):
        Finding(0, "odd", "")
