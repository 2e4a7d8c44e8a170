"""``make soak``: half an hour of random faults, thirty seconds apart in the mean; then the run must be the one without.

    python -m tests.faults.soak [--minutes 30] [--mean 30] [--seed 1] [--out docs/measurements/soak.md]

Kills, stopped processes, exceptions, a locked interpreter, NaN once, and preemption with the same command again. The
time until the next fault is drawn from an exponential distribution once the run trains again. Useful is the wall time
of the steps that stand over that of the launch.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from launch.commands_bench import device
from pretrain import events
from stoker.version import code_commit
from tests.faults import box, oracles
from tests.faults.bench import LAYERS
from tests.faults.box import Box
from tests.faults.page import table
from tests.faults.runs import Run, Strike
from tests.house.sources import HOME
from tests.launch.tiny import tiny

#: What strikes, with equal chances.
FAULTS = ("SIGKILL", "SIGSTOP", "exception", "interpreter locked", "nan", "preempted")
KINDS = {
    "SIGKILL": ("signal",), "SIGSTOP": ("stopped",), "exception": ("exception",), "interpreter locked": ("hang",),
}  # fmt: skip
#: Seconds that recording waits in each step: steps of a quarter of a second, as a real model on one host has, and a
#: number of steps that the undisturbed run, which does not wait, does in a minute or two.
PACE_S = 0.25
#: More than can be done in the time: learning rates depend on it, so both runs have it, and are asked to end.
STEPS = 1_000_000
USEFUL = 0.7


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--mean", type=float, default=30.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HOME / "docs/measurements/soak.md")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="stoker-soak-") as folder:
        config = tiny(Path(folder), LAYERS)
        place = None if box.missing() else Box("stoker")
        run = Run(config, "soak", STEPS, box=place, overrides=("launch.max_restarts=100000",))
        whole = Run(config, "whole", STEPS)
        try:
            said, launched_s = soak(run, options.minutes * 60, options.mean, random.Random(options.seed))
            undisturbed(whole, len(events.read(run.root)))
            wrong = oracles.check(run, whole)
        finally:
            run.close()
            whole.close()
            if place is not None:
                place.close()
        command = " ".join(["python -m tests.faults.soak", *arguments])
        text, good = page(command, run, said, launched_s, wrong)
    options.out.write_text(text)
    print(text)
    return 0 if good else 1


def soak(run: Run, seconds: float, mean_s: float, chance: random.Random) -> tuple[Counter[str], float]:
    """The faults that struck, and seconds of the launch."""
    said: Counter[str] = Counter()
    run.pace(PACE_S)
    began = time.monotonic()
    run.start()
    trained = 1
    while True:
        expected = trained
        run.wait(lambda: len(run.journal("training")) >= expected, "training")  # noqa: B023 - called here
        time.sleep(min(chance.expovariate(1 / mean_s), max(0.0, began + seconds - time.monotonic())))
        if time.monotonic() - began >= seconds:
            break
        what = chance.choice(FAULTS)
        trained += strike(run, what, chance.randrange(run.ranks))
        said[what] += 1
    run.processes[-1].send_signal(signal.SIGTERM)
    assert run.ended() == 4, run.output()
    run.measure()
    return said, time.monotonic() - began


def strike(run: Run, what: str, rank: int) -> int:
    """One fault; how many attempts more it takes to train on (NaN is computed away)."""
    attempt = run.attempt
    run.remember()
    if what == "preempted":
        run.processes[-1].send_signal(signal.SIGTERM)
        assert run.ended() == 4, run.output()
        run.start()
        return 1
    if what == "nan":
        run.wait_for_strike(run.arm(rank, "numbers", "nan", run.next_step("numbers", ahead=3)))
        return 0
    if what in ("SIGKILL", "SIGSTOP"):
        at = time.time()
        run.signal(rank, signal.Signals[what])
    else:
        at = run.wait_for_strike(run.arm(rank, "compute", what, run.next_step("compute", ahead=3)))
    run.strikes.append(Strike(what, KINDS[what], rank, attempt, at))
    return 1


def undisturbed(whole: Run, steps: int) -> None:
    """The same run without a fault, at least as many steps."""
    whole.start()
    whole.wait(lambda: len(whole.lines()) >= steps, "the undisturbed run", within_s=3600)
    whole.processes[-1].send_signal(signal.SIGTERM)
    assert whole.ended() == 4, whole.output()


def page(
    command: str, run: Run, said: Counter[str], launched_s: float, wrong: dict[str, list[str]]
) -> tuple[str, bool]:
    """docs/measurements/soak.md, and whether all of it is as promised."""
    stands = events.read(run.root)
    useful = sum(event.timing.step_time_s or 0.0 for event in stands) / launched_s
    good = useful >= USEFUL and not any(wrong.values())
    rows = []
    for fault in FAULTS:
        strikes = [strike for strike in run.strikes if strike.fault == fault]
        rows.append((fault, str(said[fault]), *(_seconds(strikes, what) for what in ("noticed_s", "training_s"))))
    lines = [
        "# Soak: a run under random faults", "",
        f"- command: `{command}`",
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"- commit: {code_commit() or 'unknown'}",
        f"- device: {device()}", "",
        f"{launched_s / 60:.1f} minutes, {said.total()} faults, {len(stands)} steps of {PACE_S} s and more that stand, "
        f"{len(run.lines())} done. Useful (wall time of steps that stand over that of the launch): **{useful:.3f}** "
        f"(target {USEFUL}). Seconds are median (largest).", "",
        *table(("fault", "strikes", "noticed, s", "training again, s"), rows), "",
        *(f"- {name}: {'holds' if not found else '; '.join(found[:5])}" for name, found in wrong.items()), "",
    ]  # fmt: skip
    return "\n".join(lines), good


def _seconds(strikes: Sequence[Strike], what: str) -> str:
    values = [value for strike in strikes if (value := getattr(strike, what)) is not None]
    return f"{median(values):.2f} ({max(values):.2f})" if values else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
