"""``stoker bench --save``: a table that says how to repeat it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import commands_bench
from tests.launch.test_cli import stoker


@dataclass(frozen=True)
class Row:
    """As ``kernels.bench`` has it."""

    case: str
    ratio: float | None


ROWS: dict[str, list[Any]] = {
    "kernels": [Row("T 500 | K 64", 1.23456), Row("T 1", None)],
    "train": [{"case": "T 500 | K 64", "ratio": 1.23456}, {"case": "T 1", "ratio": None}],
}


@pytest.mark.parametrize("what", ROWS)
def test_rows_are_printed_and_saved_with_what_was_measured_on_what(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands_bench, "import_module", lambda name: SimpleNamespace(run=lambda: ROWS[what]))
    monkeypatch.chdir(tmp_path)
    assert stoker("bench", what) == 0
    assert "1.235" in capfd.readouterr().out and not list(tmp_path.iterdir())

    assert stoker("bench", what, "--save") == 2
    assert "run it in a checkout" in capfd.readouterr().err
    (tmp_path / "docs").mkdir()
    assert stoker("bench", what, "--save") == 0
    text = (tmp_path / "docs" / "measurements" / f"bench-{what}.md").read_text()
    assert text.splitlines()[-4:] == [
        "| case | ratio |",
        "| --- | --- |",
        r"| T 500 \| K 64 | 1.235 |",
        "| T 1 | unknown |",
    ]
    assert f"- command: `stoker bench {what} --save`" in text
    for fact in ("date", "commit", "device", "versions: python 3."):
        assert f"\n- {fact}" in text
