"""The report's words: what was run, how far it came, how each attempt ended, on what. Fragments for ``report.py``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any
from xml.etree.ElementTree import Element

from pretrain.attempt import ExitClass
from pretrain.config import ELEMENT_BYTES, RunConfig
from pretrain.figures.markup import UNKNOWN, duration, facts, node, number, short, table
from pretrain.figures.record import AttemptRecord, Record
from pretrain.spec import Attention, Dense, FeedForward, GatedDelta, Kda, Mixer, ModelSpec, MoE
from pretrain.workload import workload_of

NAMES: Mapping[type, str] = {
    GatedDelta: "gated delta",
    Kda: "Kimi delta attention",
    Attention: "attention",
    Dense: "dense",
    MoE: "mixture of experts",
}
#: Colours of how a run ended; whatever is not here went wrong.
GOOD_ENDS = {ExitClass.DONE: "c2", ExitClass.PREEMPTED: "c4"}


def header(record: Record) -> Element:
    """Name, state, and what could not be read."""
    look, state = _state(record)
    lead = node("p", node("span", state, class_=f"state {look}"), ". ", _progress(record), class_="lead")
    found = [node("h1", record.name), lead]
    if record.unreadable:
        items = (node("li", sentence) for sentence in record.unreadable)
        found.append(node("div", node("b", "Not shown, or not in full:"), node("ul", *items), class_="warning"))
    return node("header", *found)


def _state(record: Record) -> tuple[str, str]:
    if not record.attempts:
        return "c7", "Not started"
    end = record.attempts[-1].exit
    if end is None:
        return "c7", "Running, or killed: the last attempt has not said how it ended"
    said = ending(record.attempts[-1], last=True)
    return GOOD_ENDS.get(end.exit_class, "c1"), said[0].upper() + said[1:]


def _progress(record: Record) -> str:
    asked = f" of {record.config.run.steps:,}" if record.config else ""
    done = record.events[-1].step + 1 if record.events else 0
    skipped = sum(not event.applied for event in record.events)
    several = f", in {len(record.attempts)} attempts" if len(record.attempts) > 1 else ""
    return f"{done:,}{asked} steps{f', {skipped:,} of them skipped' if skipped else ''}{several}."


def ending(attempt: AttemptRecord, last: bool) -> str:
    """How an attempt ended, in words."""
    end = attempt.exit
    if end is None:
        return "unknown: it runs, or was killed" if last else "killed: it left no record of its end"
    rank = "" if end.rank is None else f" on rank {end.rank}"
    return f"{end.exit_class.value}{rank}" + (f": {end.cause}" if end.cause else "")


def tiles(record: Record) -> Element:
    """The figures that one looks for first."""
    events = record.events
    losses = [event.loss for event in events if event.applied and math.isfinite(event.loss)]
    recent = losses[-max(1, len(losses) // 50) :]
    speeds = [speed for event in events if (speed := event.timing.tokens_per_s) is not None]
    seconds = [took for event in events if (took := event.timing.step_time_s) is not None]
    shown = [
        ("loss, nats per token", number(sum(recent) / len(recent)) if recent else UNKNOWN, _mean_of(len(recent))),
        ("tokens consumed", short(sum(event.tokens for event in events)), _each(record.config)),
        ("tokens per second", number(median(speeds)) if speeds else UNKNOWN, "median step"),
        ("time in steps", duration(sum(seconds)) if seconds else UNKNOWN, _mfu(record)),
    ]
    heldout = [
        (f"held out, {name.split('.', 1)[1].rpartition('.')[0]}", number(value), "nats per token")
        for name, value in last_aux(record).items()
        if name.startswith("heldout.") and name.endswith(".nats_per_token")
    ]
    boxes = (
        node("div", node("span", what), node("b", value), node("span", note), class_="tile")
        for what, value, note in shown + heldout
    )
    return node("div", *boxes, class_="tiles")


def _mean_of(count: int) -> str:
    return "the last step" if count == 1 else f"mean of last {count} steps" if count else "no step was applied"


def _each(config: RunConfig | None) -> str:
    return f"{config.train.global_batch:,} × {config.data.seq_len:,} a step" if config else ""


def _mfu(record: Record) -> str:
    known = [mfu for event in record.events if (mfu := event.timing.mfu) is not None]
    return f"MFU {100 * median(known):.1f} %, median" if known else f"MFU {UNKNOWN}"


def last_aux(record: Record) -> dict[str, float]:
    """The newest value of every auxiliary measurement."""
    return {name: value for event in record.events for name, value in event.aux.items()}


def run_facts(record: Record) -> Element:
    config = record.config
    if config is None:
        return node("p", "The configuration is unknown.", class_="missing")
    spec = config.model_spec()
    work = workload_of(spec, config.data.seq_len, ELEMENT_BYTES[config.run.dtype])
    schedule = config.train.schedule
    active = f"{work.active_parameters:,} met by a token"
    return facts(
        [
            ("Model", model_words(spec)),
            ("Parameters", f"{work.parameters:,} ({short(work.parameters)}), {active}"),
            ("Arithmetic", f"{config.run.dtype}; {short(work.training_flops)} FLOPs a token, forward and backward"),
            ("Batch", f"{config.train.global_batch:,} windows of {config.data.seq_len:,} tokens"),
            ("Learning rate", f"peak {config.train.lr:g}, {schedule.kind}, {schedule.warmup_steps:,} steps of warm-up"),
            ("Data", ", ".join(f"{path} ({weight:g})" for path, weight in config.data.blend.items())),
            ("Seed", str(config.run.seed)),
            ("Software", software(record.attempts[-1].environment if record.attempts else {})),
        ]
    )


def software(found: Mapping[str, Any]) -> str:
    """Stoker, its commit, Python and torch, in a line."""
    torch = found.get("packages", {}).get("torch")
    commit = found.get("code_commit")
    known = (("Stoker", found.get("stoker")), ("Python", found.get("python")), ("torch", torch))
    return ", ".join([*(f"{name} {value or UNKNOWN}" for name, value in known), f"commit {commit or UNKNOWN}"])


def model_words(spec: ModelSpec) -> str:
    """A model in a few sentences: layers by kind, widths, heads, experts."""
    kinds = Counter((NAMES[type(layer.mixer)], NAMES[type(layer.ffn)]) for layer in spec.layers)
    layers = ", ".join(f"{count} {mixer} + {ffn}" for (mixer, ffn), count in kinds.items())
    parts = dict.fromkeys([layer.mixer for layer in spec.layers] + [layer.ffn for layer in spec.layers])
    size = f"width {spec.width:,}, vocabulary {spec.vocab_size:,}"
    return "; ".join([f"{len(spec.layers)} layers: {layers}", size, *map(_part_words, parts)]) + "."


def _part_words(part: Mixer | FeedForward) -> str:
    if isinstance(part, GatedDelta):
        keys, values = f"{part.num_qk_heads} × {part.key_dim}", f"{part.num_v_heads} × {part.value_dim}"
        return f"gated delta: {keys} query/key heads, {values} value heads"
    if isinstance(part, Kda):
        heads = f"{part.num_heads} heads, keys × {part.key_dim}, values × {part.value_dim}"
        return f"Kimi delta attention: {heads}, gates of rank {part.gate_rank}"
    if isinstance(part, Attention):
        return f"attention: {part.num_heads} query and {part.num_kv_heads} key/value heads × {part.head_dim}"
    if isinstance(part, MoE):
        shared = ", and a shared one" if part.shared_hidden else ""
        return f"experts: {part.num_experts} a layer, {part.top_k} for a token, inner width {part.hidden:,}{shared}"
    return f"dense: inner width {part.hidden:,}"


def attempts(record: Record) -> list[Element]:
    if not record.attempts:
        return [node("p", "The run has not been started.", class_="missing")]
    last = record.attempts[-1].number
    rows = []
    for attempt in record.attempts:
        steps = [event.step for event in record.events if event.attempt == attempt.number]
        start = attempt.environment.get("start")
        resumed = start.get("resume_step") if start else None
        began = UNKNOWN if not start else "initial values" if resumed is None else f"checkpoint of step {resumed}"
        kept = f"{steps[0]:,} to {steps[-1]:,}" if steps else "none"
        host = str(attempt.environment.get("host", UNKNOWN))
        rows.append([str(attempt.number), began, kept, ending(attempt, attempt.number == last), host])
    note = "Steps that a later attempt did again are counted with the later one."
    return [
        table(["attempt", "began from", "its steps that stand", "how it ended", "host"], rows, text_columns=5),
        node("p", note, class_="note"),
    ]


def versions(record: Record) -> list[Element]:
    """What the last attempt ran on."""
    if not record.attempts or not (found := record.attempts[-1].environment):
        return [node("p", "Versions are unknown.", class_="missing")]
    packages, variables = found["packages"], found["variables"]
    return [
        facts(
            [
                ("Stoker", software(found)),
                ("Packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)),
                ("Not installed", ", ".join(name for name, version in packages.items() if not version) or "none"),
                ("Variables", ", ".join(f"{name}={value}" for name, value in variables.items()) or "none recorded"),
                ("Machine", f"{found.get('platform', UNKNOWN)}, {found.get('cpus', UNKNOWN)} CPUs"),
                ("Lock", str(found.get("lock_sha256", UNKNOWN))),
            ]
        )
    ]


def configuration(record: Record) -> list[Element]:
    if not record.config_text:
        return [node("p", "The configuration is unknown.", class_="missing")]
    return [node("details", node("summary", "config.yaml, every default written out"), node("pre", record.config_text))]
