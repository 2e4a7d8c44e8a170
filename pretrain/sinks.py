"""Where the events of a run go: metrics.jsonl, the console, Weights & Biases. Rank 0 opens them, once an attempt.

with open_sinks(config, run_dir, attempt, first_step) as sinks:
    sinks.step(event)               # a StepEvent, everywhere
    sinks.say("checkpoint 100")     # a line for the person who watches
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pretrain import events
from pretrain.config import RunConfig
from pretrain.events import StepEvent
from stoker.secrets import mask

UNKNOWN = "unknown"
#: Seconds that W&B may take at the end of a run to send what it has; and for its own limit, which is the same, to act.
FINISH_S, MARGIN_S = 60.0, 5.0


class Sink(Protocol):
    def step(self, event: StepEvent) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """All sinks of an attempt. The metrics file must be written: its errors stop the run; the others' do not."""

    def __init__(self, run_dir: Path, console: ConsoleSink, others: list[Sink]) -> None:
        self._run_dir = run_dir
        self._console = console
        self._others = others

    def step(self, event: StepEvent) -> None:
        events.write(self._run_dir, event)
        self._console.step(event)
        for sink in self._others:
            sink.step(event)

    def say(self, text: str) -> None:
        self._console.say(text)

    def close(self) -> None:
        for sink in (*self._others, self._console):
            sink.close()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_sinks(
    config: RunConfig, run_dir: Path, attempt: int, first_step: int = 0, console: Console | None = None
) -> Sinks:
    """The sinks that ``config.log`` asks for; ``run_dir`` exists and ``first_step`` is the one resumed at."""
    screen = ConsoleSink(console or _Screen(), config.run.steps, config.log.every, first_step, config.log.quiet)
    others: list[Sink] = [] if config.log.wandb == "off" else [WandbSink(config, run_dir, attempt, screen.say)]
    return Sinks(run_dir, screen, others)


class _Screen(Console):
    """A console whose reader may go away: ``| head`` or a closed terminal ends the lines, not the run."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process


class ConsoleSink:
    """A live line on a terminal; elsewhere a plain line every ``every`` steps, at the end, and for a skipped step.
    ``quiet`` leaves only what is said."""

    def __init__(self, console: Console, steps: int, every: int, first_step: int = 0, quiet: bool = False) -> None:
        self._console = console
        self._steps = steps
        self._every = every
        self._quiet = quiet
        self._times: deque[float] = deque(maxlen=32)
        self._live: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal and not quiet:
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self._task = self._live.add_task("", total=steps, completed=first_step, text="")
            self._live.start()

    def step(self, event: StepEvent) -> None:
        if event.timing.step_time_s is not None:
            self._times.append(event.timing.step_time_s)
        done = event.step + 1
        if self._live:
            self._live.update(self._task, completed=done, text=self._text(event))
        due = done % self._every == 0 or done == self._steps
        if not event.applied:
            self.say(f"step {event.step}: {event.verdict}, not applied ({self._text(event)})")
        elif due and not self._live and not self._quiet:
            self.say(f"step {done}/{self._steps}  {self._text(event)}")

    def say(self, text: str) -> None:
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except OSError:
            self._give_up()

    def close(self) -> None:
        live, self._live = self._live, None
        try:
            if live:
                live.stop()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Nobody reads any more; metrics.jsonl still has every step."""
        self._live = None
        self._console = Console(file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the run

    def _text(self, event: StepEvent) -> str:
        speed = event.timing.tokens_per_s
        return "  ".join(
            (
                f"loss {event.loss:.4f}",
                f"grad norm {event.grad_norm:.3f}",
                f"lr {event.lr:.2e}",
                f"{UNKNOWN if speed is None else format(round(speed), ',')} tokens/s",
                f"left {self._time_left(event)}",
            )
        )

    def _time_left(self, event: StepEvent) -> str:
        if not self._times:
            return UNKNOWN
        left_s = (self._steps - event.step - 1) * sorted(self._times)[len(self._times) // 2]
        minutes, seconds = divmod(math.ceil(left_s), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class WandbSink:
    """Weights & Biases: each attempt a W&B run, grouped by the run's name. Offline it needs no network and no account,
    and nothing of the machine is collected. A failure is said once and ends the sink, never the run.

    Curves go over ``step``, a value of ours: W&B's own step only grows, and what a rewind does again would be dropped.
    """

    def __init__(self, config: RunConfig, run_dir: Path, attempt: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._run: Any = None
        mode = wandb_mode(config)
        try:
            import wandb

            wanted = {
                "silent": True,
                "console": "off",
                "save_code": False,
                "disable_code": True,
                "disable_git": True,
                "x_disable_meta": True,
                "x_disable_stats": True,
                "init_timeout": 30.0,
                "finish_timeout": FINISH_S,
                "finish_timeout_raises": True,
            }
            self._run = wandb.init(
                project=config.log.wandb_project,
                group=config.run.name,
                name=f"{config.run.name}-{attempt:04d}",
                dir=str(run_dir),
                mode=mode,
                config=config.masked().resolved(),
                settings=wandb.Settings(**{k: v for k, v in wanted.items() if k in wandb.Settings.model_fields}),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(f"start ({mode})", error)

    def step(self, event: StepEvent) -> None:
        if self._run is None:
            return
        values = {"step": event.step, "loss": event.loss, "grad_norm": event.grad_norm, "lr": event.lr}
        values |= {"applied": int(event.applied)}
        values |= {f"aux/{name}": value for name, value in event.aux.items()}
        values |= {f"draws/{name}": count for name, count in event.draws.items()}
        values |= {f"timing/{name}": value for name, value in vars(event.timing).items() if value is not None}
        try:
            self._run.log(values)
        except Exception as error:
            self._give_up(f"log step {event.step}", error)

    def close(self) -> None:
        """Waits for what is under way, and no longer than a server that answers needs."""
        run, self._run = self._run, None
        if run is None:
            return
        failed: list[Exception] = [TimeoutError(f"no answer for {FINISH_S:.0f} s; `wandb sync` sends what is kept")]

        def finish() -> None:
            try:
                run.finish()
                failed.clear()
            except Exception as error:
                failed[:] = [error]

        waiting = threading.Thread(target=finish, name="wandb finish", daemon=True)
        waiting.start()
        waiting.join(FINISH_S + MARGIN_S)
        if failed:
            self._give_up("finish", failed[0])

    def _give_up(self, doing: str, error: Exception) -> None:
        self._run = None
        reason = mask(f"{type(error).__name__}: {error}")
        self._say(f"W&B could not {doing}: {reason}. The run goes on without it; metrics.jsonl has every step")


def wandb_mode(config: RunConfig) -> Literal["online", "offline"]:
    """online or offline: what log.wandb says, and for auto whether a key is set."""
    if config.log.wandb == "auto":
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return "online" if config.log.wandb == "online" else "offline"
