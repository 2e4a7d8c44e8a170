"""The fault matrix: every row with what is done, what must hold, and what is needed to try it.

Cases play on real runs of this folder. Rows that tests elsewhere cover name those tests, which ``make faults`` runs as
well. What is tried by neither says why.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from launch.supervise.heartbeats import KNOWN_AFTER, LEAST_LONG_S
from tests.faults import box, cases, cases_nodes, cases_spikes, clock, memory
from tests.faults.bench import QUICK_STEPS, Bench, Outcome
from tests.faults.cases import PHASES
from tests.launch.launching.slurm_cluster import missing as no_slurm


@dataclass(frozen=True)
class Target:
    """Seconds until the fault is noticed, and until the first step is done again, with warm spares on a quiet machine.
    Source: DESIGN section 10 and the brief of the launcher, November 2026."""

    noticed_s: float
    training_s: float


@dataclass(frozen=True)
class Case:
    """``quick``: it is part of ``make test``. ``needs``: what the machine must offer, of ``NEEDS``."""

    name: str
    play: Callable[[Bench], Outcome]
    target: Target | None = None
    quick: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """``tests``: files, or tests in them, that cover the row too. ``not_yet``: what of it is not tried, and why."""

    number: int
    fault: str
    cases: tuple[Case, ...] = ()
    tests: tuple[str, ...] = ()
    not_yet: str | None = None


#: Why the machine does not offer something; None where it does.
NEEDS: dict[str, Callable[[], str | None]] = {
    "switch": box.no_switch,
    "memory group": memory.missing,
    "gcc": clock.missing,
    "slurm": no_slurm,
}

KILLED, NODE, STOPPED, PARTED = (Target(*seconds) for seconds in ((0.5, 5.0), (3.0, 10.0), (3.0, 10.0), (5.0, 15.0)))
#: The brief gives it 15 s in all. One that lost its power cannot be told from one that is cut off.
STORE = PARTED
#: Three seconds without a beat, and stacks; this machine's steps are shorter than one.
HUNG = Target(4.0, 10.0)
#: A minute in a save: file systems that others use stall for seconds.
STUCK = Target(LEAST_LONG_S + 1, LEAST_LONG_S + 7)
SWITCH = ("switch",)
SUPERVISE, GUARDS, CHECKPOINT = "tests/launch/supervise", "tests/pretrain/guards", "tests/checkpoint"
LATER = "comes with the checkpoint store's own issue"

ROWS = (
    Row(
        1,
        "a process is killed",
        (
            Case(
                "kill -9 in computing and in saving",
                lambda bench: cases.killed_in_phases(bench, (1, "compute"), (0, "save"), steps=QUICK_STEPS),
                KILLED,
                quick=True,
            ),
            Case(
                "kill -9 of rank 1 in every phase of a step",
                lambda bench: cases.killed_in_phases(bench, *((1, phase) for phase in PHASES)),
                KILLED,
            ),
            Case(
                "kill -9 of rank 0 in every phase of a step",
                lambda bench: cases.killed_in_phases(bench, *((0, phase) for phase in PHASES)),
                KILLED,
            ),
            Case("kill -9 before the first step", cases.killed_while_starting),
            *(
                Case(
                    f"kill -9 at random moments, seed {seed}",
                    lambda bench, seed=seed: cases.killed_any_time(bench, seed),  # type: ignore[misc]
                    KILLED,
                )
                for seed in (1, 2, 3)
            ),
            Case(
                "kill -9 of one of four ranks",
                lambda bench: cases.killed_in_phases(bench, (3, "compute"), (0, "record"), ranks=4, name="four"),
            ),
            Case("an exception, once", lambda bench: cases.raises(bench, "exception"), KILLED),
            Case("a segmentation fault", lambda bench: cases.raises(bench, "segmentation fault", ("signal",)), KILLED),
            Case("kill -9 of the supervisor", cases.agent_killed),
        ),
        (f"{SUPERVISE}/test_agent.py", f"{SUPERVISE}/test_recovery.py", "tests/launch/test_resume.py"),
    ),
    Row(
        2,
        "a whole node is killed",
        (
            Case(
                "all processes of a node are killed",
                lambda bench: cases_nodes.node_killed(bench, 1, steps=QUICK_STEPS),
                NODE,
                quick=True,
                needs=SWITCH,
            ),
            Case(
                "a node loses power",
                lambda bench: cases_nodes.node_killed(bench, 1, unplug=True),
                NODE,
                needs=SWITCH,
            ),
            Case("a rank dies, its node lives", cases_nodes.rank_killed, KILLED, needs=SWITCH),
        ),
        (f"{SUPERVISE}/nodes",),
    ),
    Row(
        3,
        "a rank hangs",
        (
            Case("SIGSTOP in computing and in saving", cases.stopped, STOPPED),
            Case(
                "the interpreter is locked for ever",
                lambda bench: cases.hangs(bench, "interpreter locked", "compute"),
                HUNG,
            ),
            Case("the data loader never returns", lambda bench: cases.hangs(bench, "asleep", "read", rank=0), HUNG),
        ),
    ),
    Row(
        4,
        "a writer is stuck",
        (
            Case(
                "a save never returns",
                lambda bench: cases.hangs(bench, "asleep", "save", known=KNOWN_AFTER + 1),
                STUCK,
            ),
        ),
        not_yet="saves that go on beside training (checkpoint.asynchronous is refused so far): " + LATER,
    ),
    Row(
        5,
        "a slow rank",
        (Case("three times the work, live", cases.slow),),
        (f"{GUARDS}/test_stragglers.py",),
    ),
    Row(6, "the writer of checkpoints dies", not_yet="saves are synchronous, so there is none: " + LATER),
    Row(
        7,
        "the disk is full",
        tests=(f"{CHECKPOINT}/test_crash.py", "tests/launch/preflight/test_disk.py"),
        not_yet="each file of a checkpoint by itself: " + LATER,
    ),
    Row(
        8,
        "the disk errs",
        tests=(f"{CHECKPOINT}/test_elastic.py",),
        not_yet="EIO, short writes and EINTR at every call: " + LATER,
    ),
    Row(
        9,
        "a save is torn",
        tests=(f"{CHECKPOINT}/test_crash.py",),
        not_yet="reordered writes between fsyncs: " + LATER,
    ),
    Row(10, "a bit flips on disk", tests=(f"{CHECKPOINT}/test_damage.py",)),
    Row(11, "a shard is truncated, missing, swapped or old", tests=(f"{CHECKPOINT}/test_damage.py",)),
    Row(12, "a zombie writes", tests=(f"{CHECKPOINT}/test_crash.py",)),
    Row(
        13,
        "the host of the store and of the leading agent is lost",
        (
            Case(
                "all processes of the leading node are killed",
                lambda bench: cases_nodes.node_killed(bench, 0),
                STORE,
                needs=SWITCH,
            ),
            Case(
                "the leading node loses power",
                lambda bench: cases_nodes.node_killed(bench, 0, unplug=True),
                STORE,
                needs=SWITCH,
            ),
        ),
        (f"{SUPERVISE}/nodes",),
    ),
    Row(
        14,
        "the network is cut in two",
        (
            Case("a node is cut off", lambda bench: cases_nodes.cut_off(bench, 1), PARTED, needs=SWITCH),
            Case("the leading node is cut off", lambda bench: cases_nodes.cut_off(bench, 0), PARTED, needs=SWITCH),
            Case(
                "a node is heard by nobody",
                lambda bench: cases_nodes.cut_off(bench, 1, one_way=True),
                PARTED,
                needs=SWITCH,
            ),
            Case(
                "the leading node is heard by nobody",
                lambda bench: cases_nodes.cut_off(bench, 0, one_way=True),
                PARTED,
                needs=SWITCH,
            ),
            Case("a cable is in and out, five seconds each", cases_nodes.flaps, needs=SWITCH),
            Case("1 Mbit/s between nodes", cases_nodes.narrow, needs=SWITCH),
        ),
        (f"{SUPERVISE}/nodes",),
    ),
    Row(15, "clocks differ and jump", (Case("an hour ahead, two back", cases.clocks_differ, needs=("gcc",)),)),
    Row(
        16,
        "a number is not finite",
        (Case("NaN in one rank's gradient, once, live", cases.not_a_number, quick=True),),
        (f"{GUARDS}/test_recompute.py", "tests/parity/test_skip.py"),
    ),
    Row(
        17,
        "the loss spikes",
        (
            Case("a poisoned batch: back, and past it", cases_spikes.rewound),
            Case("a poisoned batch: its step is skipped", cases_spikes.skipped),
            Case("a poisoned batch: the run stops", cases_spikes.ended),
            Case("the learning rate is 1,000 times too high from a step on", cases_spikes.never_well),
        ),
        (f"{GUARDS}/test_spikes.py", f"{GUARDS}/test_rewind.py"),
    ),
    Row(
        18,
        "silent corruption in computing",
        (Case("a bit of a weight flips on one rank, live", cases.flipped_bit),),
        (f"{GUARDS}/test_replicas.py", f"{GUARDS}/test_recompute.py", f"{GUARDS}/test_fingerprint.py"),
    ),
    Row(19, "silent corruption in a collective", tests=(f"{GUARDS}/test_recompute.py", f"{GUARDS}/test_replicas.py")),
    Row(20, "host memory flips between copy and write", not_yet="there is no copy before the write: " + LATER),
    Row(
        21,
        "out of memory",
        (
            Case("the kernel kills a rank, once", cases.no_memory, needs=("memory group",)),
            Case("and again", cases.no_memory_again, needs=("memory group",)),
        ),
    ),
    Row(
        22,
        "preemption",
        (
            Case(
                "SIGTERM, and the same command again", lambda bench: cases.preempted(bench, signal.SIGTERM), quick=True
            ),
            Case("SIGUSR1, and the same command again", lambda bench: cases.preempted(bench, signal.SIGUSR1)),
        ),
        ("tests/launch/launching/test_slurm_training.py",),
    ),
    Row(
        23,
        "another layout after a restart",
        tests=("tests/launch/test_elastic.py", f"{CHECKPOINT}/test_elastic.py", f"{CHECKPOINT}/test_gloo.py"),
    ),
    Row(24, "a node that is not fit", tests=("tests/launch/preflight",)),
    Row(25, "a crash loop", (Case("an exception at the same step, always", cases.same_failure_again),)),
    Row(26, "all of it for half an hour", not_yet="`make soak` does it: docs/measurements/soak.md"),
)


def lacking(case: Case) -> str | None:
    """Why this machine cannot play a case; None where it can."""
    return next((why for need in case.needs if (why := NEEDS[need]()) is not None), None)
