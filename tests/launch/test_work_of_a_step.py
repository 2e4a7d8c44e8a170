"""What a rank tells its agent of a step's work follows the data log, and so do the figures that stand on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launch import jobs
from tests.launch.tiny import tiny, trained
from tests.parity.pool import Pool

LONGER_FROM, LONGER = 5, 4


@dataclass
class Expected:
    """A forecast, of which only the rate is known."""

    peak_flops: float = 1e9
    model_flops: float = 0.0

    def mfu(self, step_s: float, model_flops: float) -> float:
        return model_flops / step_s / self.peak_flops

    def beside_step(self, measured_s: float) -> str:
        return ""


def run(source: str) -> tuple[list[float], set[int]]:
    """Train while somebody appends longer windows to the data log; the work and the setup that an agent reads."""
    from dataio.log import DataLog
    from pretrain.config import load
    from pretrain.data import DATA_LOG, open_stores, segment_of
    from pretrain.heartbeat import SIZE, VARIABLE, Pulse
    from pretrain.session import Session

    page, works, setups = os.memfd_create("test"), [], set()
    os.ftruncate(page, SIZE)
    os.environ[VARIABLE] = f"/proc/self/fd/{page}"
    pulse, whole_read, whole_init = Pulse(page), Session.read, Session.__init__

    def read(self: Session, step: int) -> Any:
        if step == 1:
            longer = load(source, [f"data.seq_len={32 * LONGER}"])
            segment = segment_of(longer, open_stores(longer), LONGER_FROM)
            DataLog.open(self.root / DATA_LOG).append(segment, step)
        found = whole_read(self, step)
        beat = pulse.read()
        assert beat is not None and beat.phase == "compute"
        works.append(beat.work)
        setups.add(beat.setup)
        return found

    def init(self: Session, *given: Any) -> None:
        whole_init(self, *given)
        self._forecast = Expected()  # type: ignore[assignment]

    Session.read, Session.__init__ = read, init  # type: ignore[method-assign]
    try:
        jobs.run(source, ["eval.every=null"])
    finally:
        Session.read, Session.__init__ = whole_read, whole_init  # type: ignore[method-assign]
        del os.environ[VARIABLE]
    return works, setups


def test_longer_windows_from_the_data_log_are_more_work_at_once(pool: Pool, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    ((works, setups),) = pool.run(1, run, str(source))
    before, after = works[:LONGER_FROM], works[LONGER_FROM:]
    assert len(set(before)) == len(set(after)) == 1 and len(works) == 8
    assert LONGER < after[0] / before[0] < LONGER**2, "four times the tokens, and attention to more of them"
    assert len(setups) == 1 and setups != {0}
    for event, work in zip(trained(tmp_path / "runs" / "tiny"), works, strict=True):
        assert event.timing.mfu == pytest.approx(work / event.timing.step_time_s / 1e9), "of the work that was done"


def phase_at_closing(source: str) -> str:
    """What an agent reads while the sinks are closed."""
    from pretrain.heartbeat import SIZE, VARIABLE, Pulse
    from pretrain.sinks import Sinks

    page, found = os.memfd_create("test"), []
    os.ftruncate(page, SIZE)
    os.environ[VARIABLE] = f"/proc/self/fd/{page}"
    pulse, whole = Pulse(page), Sinks.close

    def close(self: Sinks) -> None:
        beat = pulse.read()
        assert beat is not None
        found.append(beat.phase)
        whole(self)

    Sinks.close = close  # type: ignore[method-assign]
    try:
        jobs.run(source, ["eval.every=null"])
    finally:
        Sinks.close = whole  # type: ignore[method-assign]
        del os.environ[VARIABLE]
    return str(found[-1])


def test_a_server_that_is_slow_to_take_the_last_of_a_run_is_no_save_that_hangs(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(1, phase_at_closing, str(tiny(tmp_path))) == ["end"]
