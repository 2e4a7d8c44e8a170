"""Which run goes next, which again, and which need not be finished: the loop over slots. No torch.

Policy: done, stopped by a verdict and stopped by the rule are over. A run that was refused waits for the next time that
the command is given. One that broke is started again, ``retries`` times, but not after the same failure twice in a row.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from launch.sweep.definition import words
from launch.sweep.history import Cut, Outcome, State, cut, ended, record_cut, started, state
from launch.sweep.ledger import Ledger, Trial
from launch.sweep.metric import metric, steps_done
from launch.sweep.rungs import Rungs
from launch.sweep.slots import Ended, Slots
from pretrain import events
from pretrain.attempt import ExitClass
from stoker.progress import progress

#: Seconds between looks at how far runs have come, where a rule may stop them, and at signals.
LOOK_S = 0.25


@dataclass
class Summary:
    """How a command ended: every active run's state, and whether it was asked to end."""

    states: dict[int, State]
    asked: bool = False

    @property
    def counts(self) -> dict[Outcome, int]:
        found = Counter(state.outcome for state in self.states.values())
        return {outcome: found[outcome] for outcome in Outcome if found[outcome]}

    @property
    def code(self) -> int:
        """Of the command: 1 where a run broke, else 4 where some are to go on, 2 where some were refused, 3 where a
        verdict stopped some, and 0 where every run is done or stopped by the rule."""
        for outcome, code in (
            (Outcome.BROKEN, 1),
            (Outcome.PREEMPTED, 4),
            (Outcome.WAITING, 4),
            (Outcome.RUNNING, 4),
            (Outcome.REFUSED, 2),
            (Outcome.STOPPED, 3),
        ):
            if outcome in self.counts:
                return code
        return 0


@dataclass
class Scheduler:
    """Runs what is left of a sweep on ``slots``; ``announce`` is told what a person would want to know."""

    ledger: Ledger
    slots: Slots
    announce: Callable[[str], None] = print
    _running: dict[int, Trial] = field(default_factory=dict)
    _failures: dict[int, list[State]] = field(default_factory=dict)
    _asked: int = 0
    _relayed: int = 0

    def run(self) -> Summary:
        trials = self.ledger.active
        states = {trial.number: state(self.ledger, trial) for trial in trials}
        waiting = deque(trial for trial in trials if not states[trial.number].outcome.over)
        for trial in [t for t in waiting if states[t.number].outcome is Outcome.RUNNING]:
            self.announce(f"run {trial.number} is at work already, under another command: it is left to it")
            waiting.remove(trial)
        rungs = self._rungs()
        with progress(self.ledger.definition.name, len(waiting)) as advance, self._signals():
            while (waiting and not self._asked) or self._running:
                while waiting and not self._asked and len(self._running) < self.slots.count:
                    self._start(waiting.popleft())
                for found in self.slots.wait(LOOK_S):
                    trial = self._running.pop(found.number)
                    states[trial.number] = self._end(trial, found)
                    if not self._asked and self._again(trial, states[trial.number]):
                        waiting.append(trial)
                    else:
                        advance(1)
                if rungs is not None:
                    self._look(rungs)
                self._relay()
        return Summary(states, self._asked > 0)

    def _start(self, trial: Trial) -> None:
        started(self.ledger, trial)
        self._running[trial.number] = trial
        self.slots.start(trial)

    def _end(self, trial: Trial, found: Ended) -> State:
        decision = cut(self.ledger.history(trial))
        code, cause = found.code, found.cause
        if code == -signal.SIGTERM and (self._asked or decision is not None):
            code, cause = ExitClass.PREEMPTED.code, "asked to end before it had begun"
        end = ended(self.ledger, trial, code, cause)
        if decision is not None:
            end = State(Outcome.CUT, str(decision), end.attempts)
        if end.outcome not in (Outcome.DONE, Outcome.CUT):
            self.announce(f"run {trial.number} ({words(trial.overrides)}): {end.outcome.value}: {_line(end.cause)}")
        return end

    def _again(self, trial: Trial, end: State) -> bool:
        if end.outcome not in (Outcome.BROKEN, Outcome.PREEMPTED):
            return False
        failures = self._failures.setdefault(trial.number, [])
        failures.append(end)
        if len(failures) > 1 and end.fingerprint is not None and end.fingerprint == failures[-2].fingerprint:
            self.announce(
                f"run {trial.number}: the same failure twice: it is not started again ({self.ledger.log(trial)})"
            )
            return False
        if len(failures) > self.ledger.definition.retries:
            self.announce(f"run {trial.number}: broke {len(failures)} times: it is left ({self.ledger.log(trial)})")
            return False
        return True

    def _rungs(self) -> Rungs | None:
        """The rungs, with all that runs have measured at them before."""
        definition = self.ledger.definition
        if definition.stop is None:
            return None
        rungs = Rungs(definition.stop, definition.metric, self.ledger.trials[0].facts.steps)
        for trial in self.ledger.trials:
            self._arrive(rungs, trial)
        return rungs

    def _look(self, rungs: Rungs) -> None:
        for trial in self._running.values():
            if cut(self.ledger.history(trial)) is None and (found := self._arrive(rungs, trial)) is not None:
                record_cut(self.ledger, trial, found)
                self.announce(f"run {trial.number} ({words(trial.overrides)}): stopped by the rule: {found}")
                self.slots.ask_to_end(trial.number)

    def _arrive(self, rungs: Rungs, trial: Trial) -> Cut | None:
        """Enter what a run has measured at the rungs that it came to since; the decision that stops it, if one does."""
        rung, run_dir = rungs.next(trial.number), self.ledger.run_dir(trial)
        if rung is None or steps_done(run_dir) < rung:
            return None
        steps = events.read(run_dir)
        while rung is not None and steps and steps[-1].step + 1 >= rung:
            value = metric(steps, self.ledger.definition.metric, before=rung)
            if (decision := rungs.arrive(trial.number, rung, value)) is not None:
                return decision
            rung = rungs.next(trial.number)
        return None

    def _relay(self) -> None:
        """Tell the runs what this process was asked since the last time."""
        if self._asked > self._relayed:
            tell = self.slots.ask_to_end if self._relayed == 0 and self._asked == 1 else self.slots.kill
            self._relayed = self._asked
            for number in self._running:
                tell(number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM: runs save and end, no other is started; a second one ends them at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            self._asked += 1
            if self._asked == 1:
                again = f"{signal.Signals(number).name} again ends them at once"
                print(f"asked to end: runs finish their step and save; {again}", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _line(text: str) -> str:
    return " ".join(text.split()) or "its log says why"
