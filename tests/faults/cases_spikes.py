"""Spikes of the loss on a real run: a batch that does harm whenever it is read, and a learning rate that is wrong."""

from __future__ import annotations

from contextlib import AbstractContextManager

from dataio.log import DataLog
from pretrain.attempt import ExitClass, read_exit
from pretrain.config_sections import GuardSection
from pretrain.data import DATA_LOG
from pretrain.guards import findings
from pretrain.rundir import attempt_path, attempts
from tests.faults import oracles
from tests.faults.bench import NO_SPARES, QUICK_STEPS, Bench, Outcome
from tests.faults.rank import BATCHES, LR
from tests.faults.runs import Run

#: The step that reads the batch that does harm, or from which on the learning rate is wrong; the guard, as it is, knows
#: what to expect after a quarter of its window.
AT = 14
WINDOW = "guard.spike_window=32"
#: Steps after the one that did harm in which it must be noticed.
NOTICED = 3


def rewound(bench: Bench) -> Outcome:
    """The run goes back before the batch, passes over it, and is bit for bit the run that never read it."""
    with _struck(bench, "rewind", poison=True) as run:
        code = run.ended()
        verdicts = [line["verdict"] for line in run.lines()]
        log = run.root / DATA_LOG
        with bench.run("calm", 2, NO_SPARES, "guard.spike=off", steps=QUICK_STEPS, data_log=log, **_poison()) as calm:
            calm.ended()
            outcome = Outcome(code, [], oracles.check(run, calm))
        back = AT // 4 * 4
        if verdicts != ["apply"] * AT + ["rewind"] + ["apply"] * (QUICK_STEPS - back):
            outcome.oracles["O3"].append(f"verdicts are {verdicts}")
        said = [(segment.from_step, segment.skip_batches) for segment in DataLog.open(log).segments]
        if said != [(0, 0), (AT, 1)]:
            outcome.oracles["O3"].append(f"the data log says {said} of steps and batches passed over")
        return _judged(run, outcome, ["spike", "rewind"], 0)


def skipped(bench: Bench) -> Outcome:
    """No rank applies the step; the next goes on from the state before it."""
    with _struck(bench, "skip", poison=True) as run:
        outcome = Outcome(run.ended(), [], _without_curve(run))
        verdicts = [line["verdict"] for line in run.lines()]
        if verdicts != ["apply"] * AT + ["skip"] + ["apply"] * (QUICK_STEPS - AT - 1):
            outcome.oracles["O3"].append(f"verdicts are {verdicts}")
        for rank in range(run.ranks):
            states = [line["state"] for line in run.history(rank)]
            if states[AT] != states[AT - 1] or len(set(states)) != QUICK_STEPS - 1:
                outcome.oracles["O1"].append(f"rank {rank} is not as it was before step {AT}")
        return _judged(run, outcome, ["spike"], 0)


def ended(bench: Bench) -> Outcome:
    """A verdict ends the run: exit code 3, nothing is started again."""
    with _struck(bench, "stop", poison=True) as run:
        outcome = Outcome(run.ended(), [], _without_curve(run))
        return _stopped(run, _judged(run, outcome, ["spike"], 3), "")


def never_well(bench: Bench) -> Outcome:
    """It is not the batch's fault: after ``guard.max_rewinds`` the run stops and says so."""
    with _struck(bench, "rewind", poison=False) as run:
        outcome = Outcome(run.ended(), [], _without_curve(run))
        most = GuardSection().max_rewinds
        outcome = _judged(run, outcome, ["spike", "rewind"] * most + ["spike"], 3)
        return _stopped(run, outcome, f"after {most} rewinds without a new checkpoint (guard.max_rewinds={most})")


def _poison() -> dict[str, str]:
    return {BATCHES: str(AT)}


def _struck(bench: Bench, policy: str, poison: bool) -> AbstractContextManager[Run]:
    struck = _poison() if poison else {LR: str(AT)}
    return bench.run(policy, 2, NO_SPARES, WINDOW, f"guard.spike={policy}", steps=QUICK_STEPS, **struck)


def _without_curve(run: Run) -> dict[str, list[str]]:
    """Of a run that no other one is like."""
    return {
        "O1": [], "O2": oracles.o2_checkpoints_stand(run), "O3": [], "O4": [], "O5": oracles.o5_nothing_left(run),
    }  # fmt: skip


def _judged(run: Run, outcome: Outcome, kinds: list[str], code: int) -> Outcome:
    """What the guards wrote, in order, and how soon; the exit code."""
    wrong, found = outcome.oracles["O4"], findings.read(run.root)
    if [finding["kind"] for finding in found] != kinds:
        wrong.append(f"the guards found {[(finding['kind'], finding['step']) for finding in found]}")
    if not found or not AT <= found[0]["step"] <= AT + NOTICED:
        wrong.append(f"what came in step {AT} was found in {found[:1]}")
    else:
        outcome.notes.append(f"found {found[0]['step'] - AT} steps later: {found[0]['text']}")
    if outcome.code != code or attempts(run.root) != [1]:
        wrong.append(f"exit code {outcome.code} after attempts {attempts(run.root)}")
    return outcome


def _stopped(run: Run, outcome: Outcome, why: str) -> Outcome:
    said = read_exit(attempt_path(run.root, 1))
    if said is None or said.exit_class is not ExitClass.STOPPED or said.kind != "verdict" or why not in said.cause:
        outcome.oracles["O4"].append(f"exit.json says {said}")
    last = run.journal("stop")
    if len(last) != 1 or why not in last[0]["text"]:
        outcome.oracles["O4"].append(f"the journal says {last}")
    return outcome
