"""From a sweep's file to its ledger: everything that can be refused is refused here, before anything is written.

A folder that is there already goes on: its runs keep their numbers, new ones are appended, and a changed file that
would make another run of one that is there is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataio.store import Store
from launch.launching.values import refuse_folder
from launch.sweep import ledger
from launch.sweep.definition import Definition, argument, words
from launch.sweep.ledger import LEDGER, Facts, Ledger, Trial, config_of
from pretrain.config import KeyClass, RunConfig, diff, read_values
from pretrain.config_sections import shows_password
from pretrain.config_yaml import apply_overrides
from pretrain.data import validate_data
from stoker import canonical
from stoker.errors import Refusal
from stoker.nearest import nearest
from stoker.secrets import mask

#: Measurements of a step by which runs can be compared, held-out loss apart.
MEASUREMENTS = ("loss", "grad_norm", "tokens_per_s", "balance_loss", "z_loss", "load_max_over_mean")
HELDOUT_UNITS = ("nats_per_token", "bits_per_byte")
#: Runs that are named in a refusal about several.
NAMED = 3


def plan(definition: Definition, threads: int) -> Ledger:
    """The ledger that this file leads to, all of it checked; nothing is written. ``threads``: of each rank, where the
    sweep is new."""
    root = definition.root
    _refuse_unusable(root)
    values = common_values(definition)
    before = ledger.read(root) if ledger.is_sweep(root) else None
    if before is None and root.exists() and (held := sorted(p.name for p in root.iterdir())):
        raise Refusal(f"{root} holds {held[0]} and no {LEDGER}: it is no sweep's folder. Choose another name or dir")
    points = definition.points()
    known = {canonical.dumps(dict(trial.overrides)): trial for trial in before.trials} if before else {}
    new = [point for point in points if canonical.dumps(point) not in known]
    numbered = [(t.number, t.overrides) for t in known.values()]
    numbered += [(number, point) for number, point in enumerate(new, start=len(known) + 1)]
    configs = {number: config_of(root, values, number, overrides) for number, overrides in numbered}
    _refuse_twins(configs, dict(numbered))
    if before is not None:
        _refuse_changes(before, definition, values, configs)
    first = next(iter(configs.values()))
    _require_metric(definition, first)
    _validate(configs, dict(numbered), definition.ranks)
    facts = _facts(configs)
    trials = tuple(Trial(number, overrides, facts[number]) for number, overrides in numbered)
    _require_rungs(definition, trials, configs)
    return Ledger(root, definition, values, trials, before.threads if before else threads)


def _refuse_unusable(root: Path) -> None:
    """Refuse a folder that cannot be made: a name that is too long, a file on the way."""
    refuse_folder("the sweep's folder", root)
    try:
        root.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise Refusal(f"the sweep's folder {root}: {error.strerror}. Choose another name or dir") from None


def common_values(definition: Definition) -> dict[str, Any]:
    """What the runs' configurations have in common, as written down. Refuses secrets, which would be."""
    values = read_values(definition.config)
    if not isinstance(values, Mapping):
        raise Refusal(f"{definition.config}: a configuration is sections of keys, not {values!r}")
    values = apply_overrides(values, [argument(key, value) for key, value in definition.base.items()])
    values.pop("provenance", None)
    overrides = [dict(definition.base), dict(definition.grid), dict(definition.zip), list(definition.list)]
    if _plain(mask(values)) != _plain(values) or _plain(mask({"": overrides})) != _plain({"": overrides}):
        raise Refusal(
            f"{definition.config} or the sweep's overrides hold a secret (a password, a key), and the sweep writes "
            "them down: leave it to the environment"
        )
    for section in (values.get("launch"), *_launch_sections(definition)):
        if not isinstance(section, Mapping):
            continue
        if section.get("webhook") is not None:
            raise Refusal(
                "launch.webhook is kept out of everything that is written, and a sweep writes its configuration "
                "down: leave it out of a sweep"
            )
        if isinstance(image := section.get("container"), str) and shows_password(image):
            raise Refusal("launch.container holds a password, and a sweep writes its configuration down: leave it out")
    return values


def _launch_sections(definition: Definition) -> Iterator[Any]:
    """What the runs' overrides say of the section ``launch``, one by one."""
    varied = [*definition.grid.items(), *definition.zip.items()]
    given = [(key, value) for key, values in varied for value in values]
    given += [pair for entry in definition.list for pair in entry.items()]
    for key, value in given:
        if key.partition(".")[0] == "launch":
            yield apply_overrides({}, [argument(key, value)])["launch"]


def _plain(value: Any) -> str:
    return canonical.dumps(value, allow_nan=True)


def _refuse_twins(configs: Mapping[int, RunConfig], overrides: Mapping[int, Mapping[str, Any]]) -> None:
    """Runs whose overrides differ and whose configurations do not."""
    seen: dict[str, int] = {}
    for number, config in configs.items():
        run = config.run.model_copy(update={"name": "run"})
        same = seen.setdefault(config.model_copy(update={"run": run}).sha256(), number)
        if same != number:
            raise Refusal(
                f"runs {same} ({words(overrides[same])}) and {number} ({words(overrides[number])}) are the same run: "
                "leave one of them out"
            )


def _refuse_changes(
    before: Ledger, definition: Definition, values: Mapping[str, Any], configs: Mapping[int, RunConfig]
) -> None:
    """A changed file must not make another run of one that is there."""
    if canonical.dumps(dict(before.values)) != canonical.dumps(dict(values)):
        changed: dict[str, list[int]] = defaultdict(list)
        for trial in before.trials:
            found = diff(before.config(trial), configs[trial.number])
            for change in (*found[KeyClass.IDENTITY], *found[KeyClass.TRAJECTORY]):
                changed[f"{change.key}: {change.old!r} -> {change.new!r}"].append(trial.number)
        if changed:
            what = "; ".join(f"{change} ({_runs(numbers)})" for change, numbers in changed.items())
            raise Refusal(
                f"{before.root} holds runs that this would make others of: {what}. Put it back, put the change into "
                "grid or list, where it makes new runs, or choose another name"
            )
    stopping = (before.definition.stop, before.definition.metric)
    if before.definition.stop is not None and stopping != (definition.stop, definition.metric):
        from launch.sweep.history import cut

        if numbers := [trial.number for trial in before.trials if cut(before.history(trial)) is not None]:
            raise Refusal(
                f"stop or metric differ, and {_runs(numbers)} of {before.root} were stopped by what they were: put "
                "them back, or choose another name"
            )


def _require_metric(definition: Definition, config: RunConfig) -> None:
    name = definition.metric.name
    known = [*MEASUREMENTS, *(f"heldout.{domain}.{unit}" for domain in config.data.heldout for unit in HELDOUT_UNITS)]
    if name not in known:
        match = nearest(name, known)
        advice = f"did you mean {match}?" if match else f"known are {', '.join(known)}"
        raise Refusal(f"metric {name} is measured by no run of {definition.config}: {advice}")


def _require_rungs(definition: Definition, trials: Sequence[Trial], configs: Mapping[int, RunConfig]) -> None:
    """Runs that are compared on the way must have come equally far by the same step, and have been measured."""
    stop = definition.stop
    if stop is None:
        return
    for what, values in {
        "run.steps": [str(trial.facts.steps) for trial in trials],
        "tokens of a step": [str(trial.facts.batch_tokens) for trial in trials],
        "tokenizers": [trial.facts.tokenizer for trial in trials],
    }.items():
        if len(found := dict.fromkeys(values)) > 1:
            raise Refusal(
                f"stop compares runs at equal steps, and theirs differ in {what} ({', '.join(found)}): leave out stop, "
                "or make sweeps of their own"
            )
    steps = trials[0].facts.steps
    if not stop.rungs(steps):
        raise Refusal(f"stop.first={stop.first} is not below run.steps={steps}: no run would be stopped")
    if definition.metric.heldout and any((c.eval.every or stop.first + 1) > stop.first for c in configs.values()):
        raise Refusal(
            f"stop compares {definition.metric.name} at step {stop.first}, and it is not measured by then: set "
            f"eval.every to {stop.first} or less"
        )


def _validate(configs: Mapping[int, RunConfig], overrides: Mapping[int, Mapping[str, Any]], ranks: int) -> None:
    """The layout and the data of every run, each once for the runs that agree in what they depend on."""
    problems: dict[str, list[int]] = defaultdict(list)
    for check, groups in (
        (lambda config: config.plan(ranks, announce=lambda text: None), _grouped(configs, _layout_key)),
        (validate_data, _grouped(configs, _data_key)),
    ):
        for numbers in groups.values():
            try:
                check(configs[numbers[0]])
            except Refusal as refusal:
                problems[str(refusal)].extend(numbers)
    if problems:
        raise Refusal(
            "; ".join(
                f"run {min(numbers)} ({words(overrides[min(numbers)])})"
                + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")
                + f": {problem}"
                for problem, numbers in list(problems.items())[:NAMED]
            )
        )


def _grouped(configs: Mapping[int, RunConfig], key: Callable[[RunConfig], Any]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, config in configs.items():
        groups[canonical.dumps(key(config))].append(number)
    return groups


def _layout_key(config: RunConfig) -> Any:
    parallel = config.parallel if isinstance(config.parallel, str) else config.parallel.model_dump(mode="json")
    batch = [config.train.global_batch, config.train.micro_batch, config.data.seq_len]
    return [config.model.model_dump(mode="json"), parallel, batch, config.run.dtype, config.run.deterministic]


def _data_key(config: RunConfig) -> Any:
    return [config.data.model_dump(mode="json"), config.model.vocab_size, config.train.global_batch]


def _facts(configs: Mapping[int, RunConfig]) -> dict[int, Facts]:
    stores: dict[str, Store] = {}
    found = {}
    for number, config in configs.items():
        blend = config.data.blend
        for path in blend:
            if path not in stores:
                stores[path] = Store.open(path)
        total = sum(blend.values())
        drawn = sorted((stores[path].dataset_id, weight / total) for path, weight in blend.items())
        order = [drawn, config.data.seq_len, config.train.global_batch]
        tokenizer = stores[next(iter(blend))].tokenizer.sha256
        tokens = config.train.global_batch * config.data.seq_len
        found[number] = Facts(config.run.steps, tokens, config.run.seed, canonical.sha256(order)[:12], tokenizer[:12])
    return found


def _runs(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:NAMED]))
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"run{'s' if len(numbers) > 1 else ''} {shown}{more}"


def folder_of(path: Path) -> Path:
    """The folder of a sweep, from its path or from the file that describes it."""
    if path.suffix in (".yaml", ".yml"):
        from launch.sweep.definition import load

        return load(path).root
    return path
