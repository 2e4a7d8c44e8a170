"""The data log of a run across its attempts: what was appended stands, what was changed holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataio.log import DataLog
from dataio.types import Part
from pretrain.config import RunConfig, load
from pretrain.data import DATA_LOG, first_log, open_stores, segment_of
from pretrain.feed import Feed
from pretrain.restore import alone
from stoker.errors import Refusal
from tests.dataio import synthetic


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = synthetic.random_store(tmp_path / "store", 5000).path
    (tmp_path / "runs" / "feed").mkdir(parents=True)
    return load(
        "demo",
        [
            f"data.blend={{{path}: 1}}",
            "data.heldout={}",
            "data.seq_len=64",
            f"run.dir={tmp_path}/runs",
            "run.name=feed",
        ],
    )


def begin(config: RunConfig, first_step: int, changed: bool) -> Feed:
    return Feed(config, open_stores(config), alone(1).control, first_step, changed)


def steps(feed: Feed) -> list[tuple[int, int]]:
    return [(segment.from_step, segment.seq_len) for segment in feed.stream.log.standing]


def test_a_resume_with_an_unchanged_configuration_keeps_what_was_appended_and_says_so(config: RunConfig) -> None:
    log = first_log(config, stores := open_stores(config)).write(config.run_dir / DATA_LOG)
    shorter = load_shorter(config)
    log = log.append(segment_of(shorter, stores, 10), 5)
    log.append(segment_of(config, stores, 100), 20)
    feed = begin(config, 20, changed=False)
    assert steps(feed) == [(0, 64), (10, 32), (100, 64)]
    assert "wins over the configuration in seq_len" in feed.note


def test_a_change_holds_from_the_resumed_step_and_can_be_undone(config: RunConfig) -> None:
    assert steps(begin(config, 0, changed=False)) == [(0, 64)]
    assert steps(begin(load_shorter(config), 20, changed=True)) == [(0, 64), (20, 32)]
    feed = begin(config, 20, changed=True)
    assert steps(feed) == [(0, 64), (20, 64)] and not feed.note


def test_a_running_feed_takes_over_what_is_appended_for_steps_to_come_only(config: RunConfig) -> None:
    feed, stores = begin(config, 0, changed=False), open_stores(config)
    part = Part()
    feed.read(0, part)
    DataLog.open(config.run_dir / DATA_LOG).append(segment_of(load_shorter(config), stores, 2), 1)
    assert feed.read(1, part)[0].seq_len == 64 and feed.read(2, part)[0].seq_len == 32
    DataLog.open(config.run_dir / DATA_LOG).append(segment_of(config, stores, 3), 3)
    with pytest.raises(Refusal, match=r"holds from step 3, which has begun; an entry can hold from step 7"):
        feed.read(7, part)


def load_shorter(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"seq_len": 32})})
