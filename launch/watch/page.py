"""The page of a run: its sections as markup, made anew as the run goes on. No script makes markup, only this."""

from __future__ import annotations

import json
import re
import time
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from launch.watch.drawn import Drawn
from launch.watch.figures import curve_data, curves, draws, plan_figures
from launch.watch.grid import ranks_grid
from launch.watch.observe import Observer
from launch.watch.prometheus import exposition
from launch.watch.record import Note, State, Status
from launch.watch.words import (
    cause_of,
    clock,
    disk,
    duration_of,
    one_line,
    outcome_of,
    steps_of,
)
from pretrain.figures.markup import UNKNOWN, duration, node, number, share, short, table, to_html
from pretrain.figures.style import STYLE
from stoker.version import VERSION

#: Seconds between two looks at a run, however many ask.
FRESH_S = 1.0
#: Attempts and events that are listed, the newest.
ATTEMPTS, EVENTS = 50, 50
TITLES = {
    "ranks": "Ranks",
    "curves": "Training",
    "attempts": "Attempts",
    "events": "Events",
    "data": "Data",
    "plan": "Plan",
}
LOOKS = {State.DONE: "c2", State.STARTING: "c0", State.RUNNING: "c2", State.RESTARTING: "c4", State.PREEMPTED: "c4"}


class Page:
    """What the server answers, of one run. Not for several threads at once."""

    def __init__(self, run_dir: Path) -> None:
        self._observer = Observer(run_dir)
        self._status = self._observer.look()
        self._looked = time.monotonic()
        self._drawn = Drawn()
        self.sections()  # what takes long is drawn before the first reader comes

    @property
    def status(self) -> Status:
        """The run as it was at most ``FRESH_S`` ago."""
        if time.monotonic() - self._looked > FRESH_S:
            self._status = self._observer.look()
            self._looked = time.monotonic()
        return self._status

    def html(self) -> bytes:
        """The whole page, complete without its script; the script keeps it fresh."""
        sections = self.sections()
        body = node("body")
        for name in sections:
            head = [node("h2", TITLES[name], id=name)] if name in TITLES else []
            body.append(node("section", *head, node("div", f"\0{name}\0", id=f"{name}-live"), class_=name))
        links = node("nav", *(node("a", title, href=f"#{name}") for name, title in TITLES.items()))
        body.insert(1, links)
        body.append(node("footer", f"Stoker {VERSION}. This page only reads. ", node("span", id="fresh")))
        document_head = node(
            "head",
            node("meta", charset="utf-8"),
            node("meta", name="viewport", content="width=device-width, initial-scale=1"),
            node("title", f"{self._status.name}: {self._status.state.value}"),
            node("link", rel="stylesheet", href="/page.css"),
            node("script", src="/page.js", defer="defer"),
        )
        page = to_html(node("html", document_head, body, lang="en"))
        # In one pass: what replaces a mark is not looked through for others.
        return re.sub(rb"\0(\w+)\0", lambda mark: _encoded(sections[mark[1].decode()]), page)

    def live(self) -> bytes:
        """What the script asks for: the markup of each section, and whether to ask again soon."""
        sections = self.sections()
        status = self._status
        said = {
            "title": f"{status.name}: {status.state.value}",
            "sections": sections,
            "again_s": 2 if status.state.is_under_way else 15,
        }
        return json.dumps(said).encode()

    def sections(self) -> dict[str, str]:
        """Markup by name."""
        status, series, drawn = self.status, self._observer.series, self._drawn
        plan, layers = self._observer.plan, tuple(self._observer.layers)
        drawn.begin()
        return {
            "head": _markup([_header(status), _tiles(status)]),
            "ranks": _markup(ranks_grid(status.ranks, status.state.is_under_way)),
            "curves": _markup(curves(series, status.attempts, drawn)),
            "attempts": _markup(_attempts(status)),
            "events": _markup(_events(status)),
            "data": _markup(draws(series, self._observer.root, drawn)),
            "plan": _markup([drawn("plan", (plan, layers), lambda: node("div", *plan_figures(plan, layers)))]),
        }

    def status_json(self) -> bytes:
        return json.dumps(self.status.to_json(), allow_nan=False).encode()

    def curves_json(self) -> bytes:
        status = self.status
        return json.dumps({"run": status.name, "curves": curve_data(self._observer.series)}, allow_nan=False).encode()

    def metrics(self) -> bytes:
        return exposition(self.status).encode()


def style() -> bytes:
    return (STYLE + (files("launch.watch") / "page.css").read_text("utf-8")).encode()


def script() -> bytes:
    return (files("launch.watch") / "page.js").read_bytes()


def _encoded(markup: str) -> bytes:
    """As ``to_html`` does: characters that UTF-8 has not become references to them."""
    return markup.encode("utf-8", "xmlcharrefreplace")


def _markup(elements: list[Element]) -> str:
    return "".join(tostring(element, "unicode", method="html") for element in elements)


def _header(status: Status) -> Element:
    look = LOOKS.get(status.state, "c1" if status.state.is_bad else "c7")
    which = f", attempt {status.attempt}" if status.state.is_under_way and status.attempt else ""
    words = f": {one_line(status.words)}" if status.words else ""
    state = node("span", status.state.value[0].upper() + status.state.value[1:], class_=f"state {look}")
    lead = node("p", state, f"{which}{words}.", class_="lead")
    found = [node("h1", status.name), lead, _bar(status)]
    if status.unreadable:
        items = (node("li", sentence) for sentence in status.unreadable)
        found.append(node("div", node("b", "Not shown, or not in full:"), node("ul", *items), class_="warning"))
    return node("header", *found)


def _bar(status: Status) -> Element:
    """Progress: a native element, which every reader knows how to read."""
    if status.steps is None:
        return node("p", f"{status.step:,} steps; the run's length is {UNKNOWN}", class_="progress")
    part = min(1.0, status.step / status.steps)
    left = f", {clock(status.time_left_s)} left" if status.state.is_under_way else ""
    words = node("span", f"{status.step:,} of {status.steps:,} steps, {100 * part:.1f} %{left}")
    return node("p", node("progress", value=status.step, max=status.steps), words, class_="progress")


def _tiles(status: Status) -> Element:
    took, mfu = status.step_time_s, status.mfu
    spent = status.useful
    redone = f", {duration(spent.redone_s)} done again" if spent.redone_steps else ""
    shown = [
        (
            "loss, nats per token",
            number(status.loss) if status.step else UNKNOWN,
            f"gradient norm {number(status.grad_norm)}",
        ),
        (
            "tokens per second",
            UNKNOWN if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}",
            f"MFU {UNKNOWN if mfu is None else f'{100 * mfu:.1f} %'}",
        ),
        ("step time", UNKNOWN if took is None else f"{number(took, 3)} s", "median of the last 32"),
        (
            "tokens consumed",
            short(status.tokens),
            f"{status.skipped:,} {'step' if status.skipped == 1 else 'steps'} skipped",
        ),
        (
            "useful time",
            UNKNOWN if spent.share is None else share(spent.share),
            f"of {UNKNOWN if spent.elapsed_s is None else duration(spent.elapsed_s)}{redone}",
        ),
        (
            "restarts",
            f"{status.restarts:,}",
            ", ".join(f"{n} {kind}" for kind, n in status.faults.items()) or "no fault",
        ),
    ]
    boxes = (
        node("div", node("span", what), node("b", value), node("span", note), class_="tile")
        for what, value, note in shown
    )
    return node("div", node("div", *boxes, class_="tiles"), node("p", f"On disk: {disk(status)}.", class_="note"))


def _attempts(status: Status) -> list[Element]:
    if not status.attempts:
        return [node("p", "The run has not been started.", class_="missing")]
    rows: list[list[str | Element]] = [
        [
            str(attempt.number),
            node("span", outcome_of(attempt), class_=f"state {_outcome_look(attempt.outcome)}"),
            cause_of(attempt) or "–",
            steps_of(attempt),
            duration_of(attempt),
            attempt.host or UNKNOWN,
        ]
        for attempt in reversed(status.attempts[-ATTEMPTS:])
    ]
    hidden = len(status.attempts) - ATTEMPTS
    more = [node("p", f"And {hidden:,} earlier ones.", class_="note")] if hidden > 0 else []
    return [table(["attempt", "outcome", "cause", "steps that stand", "lasted", "host"], rows, text_columns=6), *more]


def _outcome_look(outcome: str | None) -> str:
    state = next((state for state in State if state.value == outcome), State.UNKNOWN)
    return LOOKS.get(state, "c1" if state.is_bad else "c7")


def _events(status: Status) -> list[Element]:
    if not status.notes:
        return [node("p", "Neither the supervisor nor a guard has said anything.", class_="missing")]
    rows = [_event(note) for note in reversed(status.notes[-EVENTS:])]
    return [table(["time, UTC", "event", "what happened", "where"], rows, text_columns=4)]


def _event(note: Note) -> list[str | Element]:
    moment = (note.time or UNKNOWN)[:19].replace("T", " ")
    places = {"attempt": note.attempt, "step": note.step, "rank": note.rank}
    where = ", ".join(f"{name} {value:,}" for name, value in places.items() if value is not None)
    return [moment, note.kind + (" (guard)" if note.by == "guard" else ""), one_line(note.text), where or "–"]
