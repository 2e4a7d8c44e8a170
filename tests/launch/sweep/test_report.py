"""``stoker report SWEEP``: what the page says, what it keeps apart, how it sorts, and how big it gets."""

from __future__ import annotations

import math
import random
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.sweep.ledger import Ledger
from launch.sweep.report import SCRIPT, is_sweep, page, write_report
from launch.sweep.results import best_lines, results
from launch.sweep.scheduler import Scheduler
from pretrain.figures.chart import Line
from pretrain.figures.sweep import Results, Row
from tests.launch.sweep.sweeps import forks, planned
from tests.launch.tiny import tiny

LR, KIND, WIDTH, CLIP = "train.lr", "train.schedule.kind", "model.width", "train.clip"


def swept(folder: Path, **keys: Any) -> Ledger:
    """A sweep of runs that compute nothing, run to its end."""
    ledger = planned(folder, **keys)
    slots = forks(ledger, "no_op")
    try:
        Scheduler(ledger, slots, announce=lambda text: None).run()
    finally:
        slots.close()
    return ledger


def generated(count: int, points: int = 60) -> Results:
    """Results of a sweep over four keys, with losses that depend on two of them."""
    chance = random.Random(5)
    rows = []
    for number in range(1, count + 1):
        values = {
            LR: chance.choice([1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
            KIND: chance.choice(["wsd", "cosine"]),
            WIDTH: chance.choice([256, 384, 512]),
            CLIP: round(10 ** chance.uniform(-1, 1), 4),
        }
        loss = 2.6 + 0.09 * math.log10(values[LR] / 1e-3) ** 2 - 0.0004 * values[WIDTH] + chance.gauss(0, 0.02)
        steps = np.linspace(0, 2000, points)
        curve = loss + 4.0 * np.exp(-steps / 250) + np.random.default_rng(number).normal(0, 0.02, points)
        done = number % 9 != 0
        rows.append(
            Row(
                number=number,
                name=f"{number:04d}-{number * 2654435761 % 2**32:08x}",
                values=values,
                setting=str(number),
                seed=0,
                state="done" if done else "stopped by the rule",
                look="c2" if done else "c4",
                final=done,
                done=2000 if done else 222,
                steps=2000,
                value=loss,
                tokens_per_s=81_920.0,
                curve=Line.of(str(number), "c0", steps, curve),
                apart=("1,000 steps, not 2,000",) if number % 50 == 7 else (),
            )
        )
    rows.sort(key=lambda row: (bool(row.apart), not row.final, row.score))
    base = {LR: 1e-3, KIND: "wsd", WIDTH: 384, CLIP: 1.0}
    return Results("widths", "loss", 16, False, list(base), base, rows, [222, 666], {"run.steps": 2000}, "demo")


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name == "href"]


class Table(HTMLParser):
    """Rows of the page's tables, as text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def test_the_best_is_first_with_what_it_changes_and_how_far_it_is_from_the_base(tmp_path: Path) -> None:
    ledger = swept(tmp_path, list=[{}, {"train.lr": 0.5}, {"train.lr": 0.05}], seeds=[0, 3], base={"train.lr": 0.3})
    assert is_sweep(ledger.root) and not is_sweep(tmp_path)
    found = results(ledger)
    assert [row.values["train.lr"] for row in found.rows] == [0.05, 0.05, 0.3, 0.3, 0.5, 0.5]
    table = Table(write_report(ledger.root).read_text()).rows
    settings, runs = table.index(next(r for r in table if "deviation" in r)), next(r for r in table if "place" in r)
    assert runs == ["place", "run", "train.lr", "run.seed", "loss", "to base", "tokens/s", "steps", "state"]
    assert table[settings + 1][0] == "0.05" and table[settings + 1][-1] == "2"
    first = table[table.index(runs) + 1]
    assert first[0] == "1" and first[2] == "0.05" and first[-1] == "done"
    assert first[5] == "−0.250", "0.05 instead of 0.3, at the same seed"
    assert "train.lr=0.05" in best_lines(found)[1]


def test_runs_of_other_lengths_batches_and_tokenizers_are_flagged_and_kept_apart(tmp_path: Path) -> None:
    from tests.dataio.synthetic import TOKENIZER, random_store

    tiny(tmp_path, ("attention/dense",))
    other = type(TOKENIZER)("77" * 32, vocab_size=257, eos_id=256)
    random_store(tmp_path / "other", 3000, seed=3, source="other", tokenizer=other)
    foreign = {"data.blend": {str(tmp_path / "other"): 1}, "data.heldout": {}}
    ledger = swept(
        tmp_path,
        list=[
            *({"train.lr": lr} for lr in (1e-2, 2e-2, 3e-2, 4e-2)),
            {"run.steps": 16}, {"train.global_batch": 24}, {"run.seed": 9}, foreign,
        ],
    )  # fmt: skip
    found = {row.number: row.apart for row in results(ledger).rows}
    assert all(found[n] == () for n in (1, 2, 3, 4))
    assert found[5] == ("16 steps, not 8",)
    assert found[6] == ("768 tokens a step, not 384", "other data, or another order of it")
    assert found[7] == ("another order of the data (seed 9, not 0)",)
    assert found[8] == ("other data, or another order of it", "another tokenizer")
    assert {row.number for row in results(ledger).rows[:4]} == {1, 2, 3, 4}, "a longer run is not the best for that"
    content = write_report(ledger.root).read_text()
    assert "Not comparable by this metric" in content and "1 with another tokenizer" in content


def test_seeds_that_the_sweep_varies_are_repetitions_and_seeds_in_a_list_are_not(tmp_path: Path) -> None:
    assert all(row.apart == () for row in results(planned(tmp_path, seeds=3)).rows)


def test_a_sweep_that_has_not_begun_or_went_wrong_is_reported_too(tmp_path: Path) -> None:
    ledger = planned(tmp_path, grid={"train.lr": [1e-2, 1e-3]})
    content = write_report(ledger.root).read_text()
    assert "2 runs: 2 waiting" in content and "No run has been measured yet" in content
    run_dir = ledger.run_dir(ledger.trials[0])
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("{}\n")
    assert is_sweep(write_report(ledger.root).parent)


def test_the_page_runs_its_own_script_and_loads_nothing_whatever_a_value_says(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    ledger = planned(tmp_path, list=[{}, {"log.wandb_project": evil}])
    content = write_report(ledger.root).read_text()
    assert content.count("<script>") == 1 and SCRIPT in content and "&lt;script&gt;alert(1)" in content
    tags = Tags(content)
    assert "img" not in tags.names and not [name for name in tags.attributes if name.startswith("on") or name == "src"]
    assert all(link.startswith(("#", "000")) for link in tags.links)
    assert "default-src 'none'" in content and "script-src 'sha256-" in content


def test_a_thousand_runs_are_a_page_of_less_than_3_mb_made_in_less_than_5_s_of_cpu() -> None:
    before = time.process_time()
    content = page(generated(1000))
    took = time.process_time() - before
    assert len(content) < 3e6 and took < 5.0, (len(content), took)
    assert len(re.findall(rb"<tr", content)) > 1000
    print(f"1,000 runs: {len(content) / 1e6:.2f} MB, {took:.2f} s of CPU")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on this machine to sort the table in")
def test_a_click_sorts_by_number_the_unknown_last_and_a_second_one_turns_it_round(tmp_path: Path) -> None:
    """The page's own script, in a browser; a second script clicks and leaves what it sees in the title."""
    clicks = (
        '<script>const heads = [...document.querySelectorAll("table.sortable thead th")];'
        f'const head = heads.find(h => h.textContent === "{CLIP}"); const seen = [];'
        "for (const turn of [1, 2]) { head.firstChild.click(); seen.push([...document.querySelectorAll("
        '"table.sortable tbody tr")].map(r => r.cells[head.cellIndex].textContent).join(" ")); }'
        'document.body.textContent = seen.join("|");</script>'
    )
    content = page(generated(30)).decode()
    content = re.sub(r"; script-src 'sha256-[^\"]*'", "; script-src 'unsafe-inline'", content)
    (tmp_path / "page.html").write_text(content.replace("</body>", f"{clicks}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        ["chromium", *options, "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    body = re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr[-2000:]
    up, down = ([float(value) for value in part.split()] for part in body[1].split("|"))
    assert len(up) == 30 and up == sorted(up) and down == up[::-1]
