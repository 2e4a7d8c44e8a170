"""Faults on one node: each plays in a run of its own and says what came of it."""

from __future__ import annotations

import random
import signal
import time

from pretrain.attempt import read_exit
from pretrain.guards import findings
from pretrain.rundir import attempt_path, attempts, committed_steps
from tests.faults import clock, memory
from tests.faults.bench import NO_SPARES, QUICK_STEPS, STEPS, Bench, Outcome
from tests.faults.runs import STRIKING_S, Run, Strike

#: A rank is killed in each phase of a step: (rank, phase, seconds into it).
PHASES = ("read", "compute", "record", "evaluate", "save")
#: Kinds that a rank's own failure may have.
EXCEPTION, HANG, OOM = ("exception",), ("hang",), ("oom",)


def killed_in_phases(
    bench: Bench, *where: tuple[int, str], ranks: int = 2, name: str = "killed", steps: int = STEPS
) -> Outcome:
    with bench.run(name, ranks, steps=steps) as run:
        for rank, phase in where:
            run.kill_at(rank, phase)
        return bench.judge(run, run.finish())


def killed_any_time(bench: Bench, seed: int, times: int = 3) -> Outcome:
    """At random moments of steps at full speed, saves and evaluations included."""
    chance = random.Random(seed)
    with bench.run(f"killed-{seed}") as run:
        for _ in range(times):
            attempt = run.wait_until_warm()
            run.remember()
            run.pace(0.0)
            time.sleep(chance.uniform(0.0, 0.3))
            rank = chance.randrange(run.ranks)
            run.strikes.append(Strike("SIGKILL at a random moment", ("signal",), rank, attempt, time.time()))
            run.signal(rank, signal.SIGKILL)
        return bench.judge(run, run.finish())


def killed_while_starting(bench: Bench) -> Outcome:
    """Before the first step, where no spare waits and nothing was saved, and again as it loads."""
    with bench.run("starting") as run:
        for number, phase in enumerate(("start", "load"), start=1):
            fault = run.arm(1, phase, "hold", None)
            run.wait_for_strike(fault)
            run.strikes.append(Strike(f"SIGKILL in {phase}", ("signal",), 1, number))
            run.signal(1, signal.SIGKILL)
        return bench.judge(run, run.finish(trained=1))


def stopped(bench: Bench) -> Outcome:
    with bench.run("stopped") as run:
        run.kill_at(0, "compute", number=signal.SIGSTOP)
        run.kill_at(1, "save", number=signal.SIGSTOP)
        return bench.judge(run, run.finish())


def hangs(bench: Bench, what: str, phase: str, rank: int = 1, known: int = 0) -> Outcome:
    """``what``: the interpreter locked for ever, or a sleep. All ranks leave stacks before anything is killed.
    ``known``: checkpoints that there must be before, from which the run knows how long one takes."""
    with bench.run(f"{what.replace(' ', '-')}-{phase}") as run:
        run.pace(STRIKING_S)
        run.wait(lambda: len(committed_steps(run.root)) >= known, f"{known} checkpoints")
        run.happen(rank, phase, what, HANG)
        outcome = bench.judge(run, run.finish())
        ended = read_exit(attempt_path(run.root, run.strikes[0].attempt))
        stacks = [] if ended is None else [run.root / path for path in ended.stacks]
        if len(stacks) != run.ranks or "faulty.py" not in stacks[rank].read_text():
            outcome.oracles["O4"].append(f"the stack of rank {rank} does not show where it hangs: {stacks}")
        return outcome


def raises(bench: Bench, what: str, kinds: tuple[str, ...] = EXCEPTION, phase: str = "compute") -> Outcome:
    with bench.run(what.replace(" ", "-")) as run:
        run.happen(1, phase, what, kinds)
        return bench.judge(run, run.finish())


def slow(bench: Bench) -> Outcome:
    """One rank takes three times the processor time of its peer from some step on: it is named within twenty steps."""
    with bench.run("slow") as run:
        run.pace(STRIKING_S)
        run.wait(lambda: len(run.lines()) >= 24, "24 steps of even pace")
        begins = run.next_step("numbers")
        run.arm(1, "numbers", "slow", begins)
        outcome = bench.judge(run, run.finish(trained=1))
        found = [finding for finding in findings.read(run.root) if finding["kind"] == "slow"]
        named = [finding for finding in found if finding["rank"] == 1]
        for finding in found:
            if finding not in named:
                outcome.oracles["O4"].append(f"rank {finding['rank']} was called slow in step {finding['step']}")
        if not named or not begins <= named[0]["step"] <= begins + 20:
            outcome.oracles["O4"].append(f"rank 1 is slow from step {begins} and was named in {named}")
        else:
            outcome.notes.append(f"named {named[0]['step'] - begins} steps later, at {named[0]['ratio']:.1f} times")
        return outcome


def not_a_number(bench: Bench) -> Outcome:
    """One rank's gradient is NaN once: the step is computed again, the rank named, and no rank applies it."""
    with bench.run("nan", 2, NO_SPARES, steps=QUICK_STEPS) as run:
        run.pace(STRIKING_S)
        run.wait(lambda: len(run.lines()) >= 4, "four steps")
        step = run.next_step("numbers")
        run.arm(1, "numbers", "nan", step)
        outcome = bench.judge(run, run.finish(trained=1))
        named = [(f["step"], f["rank"]) for f in findings.read(run.root)]
        if (step, 1) not in named:
            outcome.oracles["O4"].append(f"NaN on rank 1 in step {step}, and the guards name {named}")
        return outcome


def flipped_bit(bench: Bench) -> Outcome:
    """A bit of a weight of one rank is another before an update: no rank applies it, and the run goes back.
    Of three ranks the two that agree are right."""
    with bench.run("flipped", 3, "guard.hash_every=1") as run:
        attempt = run.wait_until_warm()
        run.remember()
        step = run.next_step("numbers")
        fault = run.arm(1, "numbers", "flip", step)
        run.pace(STRIKING_S)
        run.strikes.append(Strike("a bit of a weight flips", ("mismatch",), 1, attempt, run.wait_for_strike(fault)))
        outcome = bench.judge(run, run.finish())
        ended = read_exit(attempt_path(run.root, attempt))
        if ended is None or ended.step not in (step, step + 1):
            outcome.oracles["O4"].append(f"weights that differ in step {step}, and exit.json says {ended}")
        else:
            outcome.notes.append(f"found {ended.step - step} steps later, with a hash every step")
        return outcome


def clocks_differ(bench: Bench) -> Outcome:
    """The node's clock is an hour ahead, and one rank's goes back by two in the middle; then a rank is killed."""
    shim = clock.built(bench.folder)
    with bench.run("clock", 2, LD_PRELOAD=str(shim), FAULT_CLOCK_S="3600") as run:
        run.wait_until_warm()
        fault = run.arm(1, "compute", "clock", run.next_step("compute"), seconds=-7200)
        run.wait_for_strike(fault)
        run.kill_at(0, "compute")
        run.strikes[0].at = None  # the journal's times are the node's
        outcome = bench.judge(run, run.finish())
        if any(line["kind"] != "signal" for line in run.journal("fault")):
            outcome.oracles["O4"].append("the clock led to a fault")
        return outcome


def no_memory(bench: Bench) -> Outcome:
    """One rank takes all memory of the control group, and the kernel kills it: named, and done once more."""
    with memory.limited(memory.LIMIT_BYTES) as group, bench.run("memory") as run:
        group.take(run.processes[0].pid)
        run.happen(1, "compute", "eat memory", OOM)
        return bench.judge(run, run.finish())


def no_memory_again(bench: Bench) -> Outcome:
    """It comes back: after two it is over."""
    with memory.limited(memory.LIMIT_BYTES) as group, bench.run("memory-again") as run:
        group.take(run.processes[0].pid)
        run.happen(1, "compute", "eat memory", OOM, times=9)
        run.pace(0.0)
        code = run.ended()
        run.strikes.append(Strike("eat memory again", OOM, 1, run.strikes[0].attempt + 1))
        return _stopped_after_two(bench, run, code)


def same_failure_again(bench: Bench) -> Outcome:
    with bench.run("again") as run:
        run.happen(1, "compute", "exception", EXCEPTION, times=9)
        run.pace(0.0)
        code = run.ended()
        run.strikes.append(Strike("exception again", EXCEPTION, 1, run.strikes[0].attempt + 1))
        return _stopped_after_two(bench, run, code)


def _stopped_after_two(bench: Bench, run: Run, code: int) -> Outcome:
    outcome = bench.judge(run, code, f"{len(attempts(run.root))} attempts")
    stop = run.journal("stop")
    if code != 1 or len(attempts(run.root)) != 2 or len(stop) != 1 or "twice" not in stop[0]["text"]:
        outcome.oracles["O4"].append(f"exit code {code} after {attempts(run.root)}: {stop}")
    return outcome


def preempted(bench: Bench, number: signal.Signals) -> Outcome:
    """Asked to end it saves the step under way and ends with code 4; the same command goes on from there."""
    with bench.run(f"asked-{number.name.lower()}", 2, NO_SPARES, steps=QUICK_STEPS) as run:
        run.pace(STRIKING_S)
        run.wait(lambda: len(run.lines()) >= 6, "six steps")
        run.remember()
        asked = time.monotonic()
        run.processes[0].send_signal(number)
        code = run.ended()
        took = time.monotonic() - asked
        saved, done = committed_steps(run.root)[-1], len(run.lines())
        run.pace(0.0)
        run.start()
        outcome = bench.judge(run, run.ended(), f"saved and ended {took:.1f} s after {number.name}")
        if code != 4 or saved != done or len(run.lines()) != run.steps:
            outcome.oracles["O3"].append(f"exit code {code}, step {saved} was saved and {done} were done")
        ended = read_exit(attempt_path(run.root, 1))
        if ended is None or ended.kind != "preempted":
            outcome.oracles["O4"].append(f"exit.json of the first attempt says {ended}")
        return outcome


def agent_killed(bench: Bench) -> Outcome:
    """kill -9 to the supervisor itself: its ranks and spares end with it, and the same command goes on."""
    with bench.run("agent") as run:
        run.wait_until_warm()
        run.remember()
        run.processes[0].kill()
        run.ended()
        outcome = bench.judge(run, 0)
        left = outcome.oracles["O5"]
        run.pace(0.0)
        run.start()
        outcome = bench.judge(run, run.ended())
        outcome.oracles["O5"] += left
        return outcome
