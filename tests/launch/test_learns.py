"""The demo model learns more than which token follows which: five times the demo's length beats a bigram model."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataio.baseline import bigram
from dataio.demo import build
from launch.demo import DATA, LAYOUT, PRESET, RANKS
from launch.local import train
from pretrain import events
from pretrain.config import load
from pretrain.data import open_heldout, open_stores

pytestmark = [pytest.mark.verify, pytest.mark.timeout(2400)]

LONGER = 5


def test_a_run_five_times_as_long_as_the_demo_ends_below_a_bigram_model_of_the_same_corpus(tmp_path: Path) -> None:
    build(DATA)
    short = load(PRESET)
    overrides = [
        *LAYOUT,
        f"run.dir={tmp_path}",
        f"run.steps={LONGER * short.run.steps}",
        f"train.schedule.decay_steps={LONGER * (short.train.schedule.decay_steps or 1)}",
        "checkpoint.every=null",
        "eval.every=null",
        "log.wandb=off",
        "log.every=100",
    ]
    assert train(PRESET, overrides, RANKS) == 0
    config = load(PRESET, overrides)
    last = events.read(config.run_dir)[-1]
    counts = bigram(list(open_stores(config).values()))
    for domain, store in open_heldout(config).items():
        found, bound = last.aux[f"heldout.{domain}.nats_per_token"], counts.cross_entropy([store])
        print(f"{domain}: {found:.3f} nats per token, bigram {bound:.3f}")
        assert found < bound
    assert last.aux["load_max_over_mean"] <= 2
