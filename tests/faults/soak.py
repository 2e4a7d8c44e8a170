"""``make soak``: half an hour of random faults, thirty seconds apart in the mean; then the run must be the one without.

    python -m tests.faults.soak [--minutes 30] [--mean 30] [--seed 1] [--shape node|nodes|both] [--only FAULT ...]
                                [--out docs/measurements/soak.md]

Half of the time a run on one node, half a launch of three, of which two train and one is a spare. Faults are dealt
like cards, so that each comes as often as any other; the time from one to the next is drawn from an exponential
distribution, and where the run does not train again by then the next one waits for that; after a quarter of them a
rank is killed while the run recovers. Useful is the wall time of the steps that stand (as they say themselves: without
checkpoints, evaluation, and what was done twice; none for more than the median step) over that of the launch, from its
first command to the end of its last process.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from launch.commands_bench import device
from pretrain import events
from stoker.version import code_commit
from tests.faults import box, clock, memory, oracles
from tests.faults.bench import LAYERS
from tests.faults.box import Box, Network
from tests.faults.page import table
from tests.faults.runs import Launch, Run, Strike
from tests.faults.strikes import NO_MEMORY, ONE_NODE, RECOVERING, SEVERAL, Fault, while_recovering
from tests.house.sources import HOME
from tests.launch.tiny import tiny

#: Seconds that recording waits in each step: steps of a quarter of a second, as a real model on one host has, and a
#: number of steps that the undisturbed run, which does not wait, does in a few minutes.
PACE_S = 0.25
#: More than can be done in the time: learning rates depend on it, so all runs have it, and are asked to end.
STEPS = 1_000_000
#: Share of faults during whose recovery a rank is killed, and faults that lie between two of memory: two in a row end a
#: launch, as they should.
SECOND, APART = 0.25, 4
USEFUL = 0.7
#: Saves of this model take milliseconds on a disk of its own: five seconds are a hang in every phase, and not sixty.
OVERRIDES = ("launch.max_restarts=100000", "launch.hang_s=5", "guard.hash_every=1")
SHAPES = {"node": ("One node, two ranks", ONE_NODE), "nodes": ("Three nodes: two of a rank each, one spare", SEVERAL)}


@dataclass
class Soaked:
    """What came of one shape. ``said``: strikes by fault; ``left``: what was left as it ended; ``wrong``: by oracle,
    what does not hold."""

    title: str
    run: Run
    faults: Sequence[Fault]
    missing: dict[str, str]
    seconds: float = 0.0
    said: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    @property
    def useful(self) -> float:
        took = [event.timing.step_time_s or 0.0 for event in events.read(self.run.root)]
        usual = median(took)
        return sum(min(seconds, usual) for seconds in took) / self.seconds

    @property
    def good(self) -> bool:
        return self.said.total() > 0 and self.useful >= USEFUL and not any(self.wrong.values())


def main(arguments: Sequence[str]) -> int:
    known = sorted({fault.name for fault in (*ONE_NODE, *SEVERAL)})
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--mean", type=float, default=30.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--only", nargs="+", choices=known, metavar="FAULT", help="; ".join(known))
    parser.add_argument("--out", type=Path, default=HOME / "docs/measurements/soak.md")
    options = parser.parse_args(arguments)
    shapes = [shape for shape in SHAPES if options.shape in (shape, "both")]
    skipped = {}
    if "nodes" in shapes and (why := box.no_switch()) is not None:
        shapes.remove("nodes")
        skipped["nodes"] = why
    done: list[Soaked] = []
    with tempfile.TemporaryDirectory(prefix="stoker-soak-") as folder, ExitStack() as places:
        config = tiny(Path(folder), LAYERS)
        for shape in shapes:
            soaked = places.enter_context(begun(shape, config, options.only))
            soak(soaked, options.minutes * 60 / len(shapes), options.mean, random.Random(options.seed))
            done.append(soaked)
        whole = Run(config, "whole", STEPS)
        places.callback(whole.close)
        undisturbed(whole, max((len(events.read(each.run.root)) for each in done), default=0))
        for soaked in done:
            wrong = oracles.check(soaked.run, whole)
            soaked.wrong = {**wrong, "O5": soaked.left + wrong["O5"]}
        text = page(" ".join(["python -m tests.faults.soak", *arguments]), done, skipped)
        good = bool(done) and all(soaked.good for soaked in done)
    options.out.write_text(text)
    print(text)
    return 0 if good else 1


@contextmanager
def begun(shape: str, config: Path, only: Sequence[str] | None) -> Iterator[Soaked]:
    """A run of this shape, not started; what is left of it is ended after the block."""
    title, faults = SHAPES[shape]
    faults = [fault for fault in faults if only is None or fault.name in only]
    missing = {fault.name: why for fault in faults if (why := fault.missing()) is not None}
    faults = [fault for fault in faults if fault.name not in missing]
    shim = {} if clock.missing() else {"LD_PRELOAD": str(clock.built(config.parent))}
    with ExitStack() as stack:
        run: Run
        if shape == "nodes":
            network = Network(config.parent, 3)
            stack.callback(network.close)
            run = Launch(config, "soak-nodes", STEPS, overrides=OVERRIDES, network=network, environment=shim)
        else:
            place = None if box.missing() else Box("stoker")
            if place is not None:
                stack.callback(place.close)
            group = None if memory.missing() else stack.enter_context(memory.limited(memory.LIMIT_BYTES))
            run = Run(config, "soak-node", STEPS, 2, OVERRIDES, place, group, environment=shim)
        stack.callback(run.close)
        yield Soaked(title, run, faults, missing)


def soak(soaked: Soaked, seconds: float, mean_s: float, chance: random.Random) -> None:
    """Strike a run for so many seconds, and ask it to end."""
    run = soaked.run
    run.pace(PACE_S)
    cards = dealt(soaked.faults, chance)
    began = time.monotonic()
    run.start()
    attempt, struck_at = 1, began
    while True:
        wait_until_training(run, attempt)
        due = min(struck_at + chance.expovariate(1 / mean_s), began + seconds)
        time.sleep(max(0.0, due - time.monotonic()))
        struck_at = time.monotonic()
        if not soaked.faults or time.monotonic() - began >= seconds:
            break
        fault = next(cards)
        soaked.said[fault.name] += 1
        run.remember()
        attempt = run.attempt
        print(f"{time.monotonic() - began:7.1f} s, attempt {attempt}: {fault.name}", flush=True)
        struck = fault.play(run, chance)
        if struck.ends and chance.random() < SECOND:
            while_recovering(run, chance, attempt)
            soaked.said[RECOVERING] += 1
            attempt += 1
        attempt += struck.ends
        if struck.back is not None and not struck.late:
            struck.back()
        if struck.back is not None and struck.late:
            wait_until_training(run, attempt, all_nodes=False)
            struck.back()
    run.ask_to_end()
    code = run.ended()
    assert code == 4, f"asked to end, it ended with code {code}:\n{run.output()}"
    soaked.seconds = time.monotonic() - began
    soaked.left = oracles.o5_nothing_left(run)
    run.measure()


def wait_until_training(run: Run, attempt: int, all_nodes: bool = True) -> None:
    """Until an attempt of this number or a later one has done a step on every rank, and every node is there."""
    run.wait(lambda: run.attempt >= attempt and run.trained(run.attempt), f"training in attempt {attempt}")
    if all_nodes and isinstance(run, Launch) and (network := run.network) is not None:
        run.wait(lambda: all(map(network.connected, range(len(network.boxes)))), "all nodes to be connected")


def dealt(faults: Sequence[Fault], chance: random.Random) -> Iterator[Fault]:
    """The faults again and again, in another order each time."""
    while faults:
        cards = chance.sample(faults, len(faults))
        last = [card for card in cards[:APART] if card.name == NO_MEMORY]
        yield from [card for card in cards if card not in last] + last


def undisturbed(whole: Run, steps: int) -> None:
    """The same run without a fault, at least as many steps."""
    whole.start()
    while len(whole.history(0)) < steps:
        assert whole.processes[0].poll() is None, whole.output()
        time.sleep(1.0)
    whole.ask_to_end()
    code = whole.ended()
    assert code == 4, whole.output()


def page(command: str, done: Sequence[Soaked], skipped: dict[str, str]) -> str:
    """docs/measurements/soak.md."""
    lines = [
        "# Soak: runs under random faults", "",
        f"- command: `{command}`",
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"- commit: {code_commit() or 'unknown'}",
        f"- device: {device()}", "", INTRODUCTION, "",
    ]  # fmt: skip
    for soaked in done:
        stands, all_lines = len(events.read(soaked.run.root)), len(soaked.run.lines())
        lines += [
            f"## {soaked.title}", "",
            f"{soaked.seconds / 60:.1f} minutes, {soaked.said.total()} faults (one in "
            f"{soaked.seconds / max(soaked.said.total(), 1):.0f} s), {soaked.run.attempt} attempts, {stands} steps "
            f"that stand, {all_lines} done. Useful: **{soaked.useful:.3f}** (target {USEFUL}).", "",
            *table(("fault", "strikes", "noticed, s", "training again, s"), _rows(soaked)), "",
        ]  # fmt: skip
        lines += [f"- {name}: {'; '.join(found[:5]) or 'holds'}" for name, found in sorted(soaked.wrong.items())]
        lines += [f"- not tried here, {name}: {why}" for name, why in soaked.missing.items()]
        lines.append("")
    lines += [f"{SHAPES[shape][0]}: not run, {why}" for shape, why in skipped.items()]
    return "\n".join(lines).rstrip("\n") + "\n"


INTRODUCTION = f"""\
Written by the command above. Faults strike a run of a small model in float64 on two ranks over gloo, at random moments
and in random order, each as often as any other; after a quarter of them a rank is killed before the run has recovered.
Steps take {PACE_S} s and more; {", ".join(f"`{each}`" for each in OVERRIDES)}. Useful is the wall time of the steps
that stand (without checkpoints, evaluation, and what was done twice; none for more than the median step) over that of
the launch. Seconds are median
(largest), from the fault to the supervisor's line about it and to the next step; where a second fault struck meanwhile
they hold both. Oracles O1 to O5 are those of [the fault matrix](../fault-matrix.md): O1 says that curve and state of
every rank after every step are, bit for bit, those of a run without a fault."""


def _rows(soaked: Soaked) -> Iterator[tuple[str, ...]]:
    for fault in (*(fault.name for fault in soaked.faults), RECOVERING):
        strikes = [strike for strike in soaked.run.strikes if strike.fault == fault]
        yield fault, str(soaked.said[fault]), _seconds(strikes, "noticed_s"), _seconds(strikes, "training_s")


def _seconds(strikes: Sequence[Strike], what: str) -> str:
    values = [value for strike in strikes if (value := getattr(strike, what)) is not None]
    return f"{median(values):.2f} ({max(values):.2f})" if values else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
