"""Configuration: what is written is what is run, and what cannot be run is refused by one message (P7)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import spec
from pretrain.config import RunConfig, allowed_changes, diff, load, parse, presets
from pretrain.config_base import KeyClass, keys
from pretrain.config_model import (
    AttentionSection,
    DenseSection,
    GatedDeltaSection,
    KdaSection,
    ModelSection,
    MoESection,
)
from pretrain.config_sections import ScheduleSection
from pretrain.config_yaml import apply_overrides
from stoker.errors import Refusal
from stoker.sections import section_of
from stoker.yaml_core import dump_yaml, parse_yaml


def small() -> dict[str, Any]:
    """A configuration with every kind of layer, as plain values."""
    return {
        "run": {"name": "small", "steps": 20},
        "model": {
            "width": 24,
            "vocab_size": 257,
            "layers": ["kda/dense", {"repeat": 2, "layers": ["gated_delta/moe", "attention/moe"]}],
            "gated_delta": {"num_qk_heads": 2, "num_v_heads": 4, "key_dim": 8, "value_dim": 8},
            "kda": {"num_heads": 2, "key_dim": 8, "value_dim": 4, "gate_rank": 5},
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
            "dense": {"hidden": 48},
            "moe": {"num_experts": 4, "top_k": 2, "hidden": 16},
        },
        "data": {"blend": {"data/a": 1.0}, "seq_len": 65},
        "train": {"global_batch": 12, "lr": 1e-3},
    }


def with_overrides(*overrides: str) -> RunConfig:
    return parse(apply_overrides(small(), overrides), "run.yaml")


#: Override, and what the message must say after the name of the source.
REFUSALS = [
    ("train.lrr=1e-3", "unknown key train.lrr: did you mean train.lr?"),
    ("trian.lr=1e-3", "unknown key trian: did you mean train?"),
    ("train.betas=[0.9, 0.9]", "unknown key train.betas: did you mean train.optimizer.betas?"),
    ("model.moe.experts=4", "unknown key model.moe.experts: did you mean model.moe.num_experts?"),
    ("parallel.tpp=2", "unknown key parallel.tpp: did you mean parallel.tp?"),
    ("run.zzz=1", "unknown key run.zzz: known are run.name, run.dir,"),
    ("run.dtype=fp8", "run.dtype='fp8' should be 'float64', 'float32' or 'bfloat16'"),
    ("run.dtype=float16", "run.dtype='float16' should be"),
    ("run.steps=1.5", "run.steps=1.5 should be a valid integer (Length of the run"),
    ("run.steps=0", "run.steps=0 should be greater than or equal to 1"),
    ("run.steps=true", "run.steps=True should be a valid integer"),
    ("run.steps='20'", "run.steps='20' should be a valid integer"),
    ("run.steps=null", "run.steps=None should be a valid integer"),
    ("run.name=../elsewhere", "run.name='../elsewhere' should match"),
    ("run.resume=sometimes", "run.resume='sometimes' should be 'auto' or 'never' or should be a valid integer"),
    ("run.resume=-1", "run.resume=-1 should be"),
    ("run.allow_change=[train.lrr]", "run.allow_change names train.lrr, no trajectory key: did you mean train.lr?"),
    ("run.allow_change=[model.width]", "run.allow_change names model.width, no trajectory key"),
    ("model=null", "model=None should be an object"),
    ("model.layers=[]", "model.layers=[] should have at least 1 item"),
    ("model.layers=attention/dense", "model.layers: layers is a list"),
    (
        "model.layers=[gated_delta/mo]",
        "model.layers: unknown layer 'gated_delta/mo': did you mean gated_delta/moe?",
    ),
    ("model.layers=[{repeat: 0, layers: [attention/moe]}]", "a repeated block is {repeat: n, layers: [...]}"),
    ("model.moe=null", "a layer uses moe and model.moe is missing"),
    ("model.layers=[gated_delta/dense]", "model.kda is given and no layer uses it"),
    ("model.layers=[kda/dense, attention/moe]", "model.gated_delta is given and no layer uses it"),
    ("model.layers=[kad/moe]", "model.layers: unknown layer 'kad/moe': did you mean kda/moe?"),
    ("model.kda.gate_rank=0", "Kda.gate_rank=0 must be positive"),
    ("model.kda.key_dim=1", "kda.key_dim=1: a decay per channel is then one per head, use gated_delta"),
    ("model.kda={num_heads: 2, key_dim: 8, value_dim: 4}", "model.kda.gate_rank"),
    ("model.moe.top_k=9", "moe.top_k=9 is larger than moe.num_experts=4"),
    ("model.gated_delta.num_v_heads=3", "gated_delta.num_v_heads=3 is not a multiple of num_qk_heads=2"),
    ("model.attention.num_kv_heads=3", "attention.num_heads=4 is not a multiple of num_kv_heads=3"),
    ("model.attention.rope_fraction=0.4", "rotated dims must be even"),
    ("data.blend={}", "data.blend={} "),
    ("data.blend={data/a: 0}", "data.blend.data/a=0 should be greater than 0"),
    ("train.lr=.nan", "train.lr='.nan' should be a valid number"),
    ("train.lr=-1", "train.lr=-1 should be greater than 0"),
    ("train.micro_batch=5", "micro_batch=5 does not divide global_batch=12: the nearest that does is 4"),
    ("train.optimizer.betas=[0.9]", "train.optimizer.betas.1 is missing"),
    ("train.optimizer.betas=[0.9, 1.0]", "train.optimizer.betas.1=1.0 should be less than 1"),
    ("train.schedule.kind=linear", "train.schedule.kind='linear' should be 'wsd' or 'cosine'"),
    ("checkpoint.asynchronous=true", "checkpoint.asynchronous: true is not built yet"),
    ("parallel=autos", "parallel='autos' should be 'auto'"),
    ("parallel.stages=[3, x]", "parallel.stages.1='x' should be a valid integer"),
    ("log.wandb=on", "log.wandb='on' should be 'auto', 'online', 'offline' or 'off'"),
]


@pytest.mark.parametrize(("override", "expected"), REFUSALS, ids=[override for override, _ in REFUSALS])
def test_p7_every_refusal_is_one_message_that_names_the_key_and_what_to_do(override: str, expected: str) -> None:
    with pytest.raises(Refusal) as refused:
        with_overrides(override)
    message = str(refused.value)
    assert message.startswith("run.yaml: ") and expected in message
    assert "\n" not in message and "pydantic" not in message
    assert "; " not in message.split(expected)[0], "one problem, one message"


def test_p7_at_least_thirty_ways_to_misconfigure_a_run_are_refused() -> None:
    assert len(dict(REFUSALS)) >= 30


def test_a_refusal_lists_all_problems_of_a_configuration_at_once() -> None:
    with pytest.raises(Refusal, match=r"unknown key data\.sep: .*; train\.lr=0 .*; parallel\.tp=0 "):
        with_overrides("train.lr=0", "parallel.tp=0", "data.sep=1")
    with pytest.raises(
        Refusal, match=r"run is missing: .*; model is missing: .*; data is missing: .*; train is missing"
    ):
        parse({})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: {name: a", "line 1: expected"),
        ("train: {lr: 1}\ntrain: {lr: 2}", "line 2: key train is given twice"),
        ("run: {name: a, name: b}", "line 1: key name is given twice"),
        ("data: {blend: {1: 2}}", "line 1: key 1 is not text"),
        ("[1, 2]", "a configuration is sections of keys"),
        ("", "a configuration is sections of keys"),
        ("format: {name: config, version: 99}", "newer release"),
        ("format: {name: store, version: 1}", "where 'config' was expected"),
        ("run: {name: a\x07}", "not allowed"),
        ("run: &a [*a]", "not plain values"),
        ("run: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_p7_what_is_no_configuration_is_refused_by_file_and_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(Refusal, match=r"run\.yaml") as refused:
        load(path)
    assert expected in str(refused.value)


def test_p7_a_missing_file_and_a_misspelt_preset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="No such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(Refusal, match=r"did you mean demo\?"):
        load("dmo")
    with pytest.raises(Refusal, match=r"not of the form section\.key=value"):
        load("demo", ["train.lr"])


@pytest.mark.parametrize(
    ("world", "overrides", "expected"),
    [
        (2, ["parallel.tp=3"], "does not divide world_size=2"),
        (5, [], "does not divide global_batch=12"),
        (3, ["parallel.tp=3", "parallel.sequence_parallel=true"], "tp=3 does not divide"),
        (2, ["parallel.tp=2"], "routing cuts the 1*65 = 65 tokens of a micro-batch over tp=2"),
        (3, ["parallel.ep=3"], "ep=3 does not divide"),
        (2, ["parallel.cp=2"], "cp"),
        (2, ["parallel.vpp=2"], "needs pp > 1"),
        (2, ["parallel.sequence_parallel=true"], "needs tp > 1"),
        (8, ["parallel.pp=8"], "5 layers cannot fill"),
        (2, ["parallel.pp=2", "parallel.stages=[1, 1]"], "must cover layers 0 to 4"),
        (4, ["parallel.pp=4", "parallel.vpp=1", "parallel.stages=[3, 2]"], "2 chunks where pp*vpp"),
        (2, ["parallel.pp=2", "parallel.vpp=2", "train.global_batch=1"], "interleaving needs at least"),
    ],
)
def test_p7_a_layout_that_cannot_run_is_refused(world: int, overrides: list[str], expected: str) -> None:
    config = with_overrides(*overrides)
    with pytest.raises(Refusal) as refused:
        config.plan(world)
    assert expected in str(refused.value)


def test_axes_not_named_are_one_and_data_parallelism_takes_the_rest() -> None:
    plan = with_overrides("parallel.pp=2", "parallel.stages=[2, 3]").plan(6)
    assert (plan.tp, plan.pp, plan.dp, plan.stages) == (1, 2, 3, ((0, 1), (2, 3, 4)))


def test_p7_parallel_auto_says_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))  # where no machine was ever measured
    said: list[str] = []
    plan = with_overrides("parallel=auto").plan(3, said.append)
    assert plan.dp == 3 and len(said) == 1 and "data parallelism over all 3 ranks" in said[0]
    assert "`stoker plan calibrate`" in said[0]
    with_overrides("parallel.ep=2").plan(2, said.append)
    assert len(said) == 1


def test_an_axis_by_hand_replaces_auto() -> None:
    assert apply_overrides({"parallel": "auto"}, ["parallel.ep=2"]) == {"parallel": {"ep": 2}}


def test_overrides_do_not_change_what_they_are_applied_to() -> None:
    values = small()
    apply_overrides(values, ["train.lr=1", "model.moe.top_k=1"])
    assert values == small()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3E5", 3e5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("off", "off"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2026-11-22", "2026-11-22"),
        ("0x10", "0x10"),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, 2.0]", [1, 2.0]),
    ],
)
def test_yaml_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse_yaml(text, "here")
    assert read == value and type(read) is type(value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["1e-3", "off", "null", "1_0", "12:30", "~", "=", "<<", "-", "0o7", ".5"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=8), plain, max_size=4))
def test_yaml_written_is_yaml_read(value: dict[str, Any]) -> None:
    assert repr(parse_yaml(dump_yaml(value), "here")) == repr(value)


def test_resolved_writes_out_every_default_and_is_read_back() -> None:
    config = parse(small())
    resolved = config.resolved()
    assert resolved["format"] == {"name": "config", "version": 1}
    assert resolved["train"]["optimizer"]["betas"] == [0.9, 0.95] and resolved["run"]["resume"] == "auto"
    assert len(resolved["model"]["layers"]) == 5
    assert parse(resolved) == config
    assert parse(parse_yaml(config.to_yaml(code_commit="0123"), "config.yaml")) == config


def test_the_hash_is_that_of_the_run_not_of_how_it_was_written() -> None:
    config = parse(small())
    assert config.sha256() == parse(config.resolved()).sha256()
    assert config.sha256() != with_overrides("train.lr=2e-3").sha256()


def test_every_key_says_what_it_means_and_what_its_change_means() -> None:
    assert dict(keys(RunConfig))["run.seed"] is KeyClass.IDENTITY

    def check(section: type[Any]) -> None:
        for name, field in section.model_fields.items():
            if inner := section_of(field.annotation):
                check(inner)
            else:
                assert field.description, f"{section.__name__}.{name} has no description"

    check(RunConfig)


@pytest.mark.parametrize(
    ("section", "described"),
    [
        (GatedDeltaSection, spec.GatedDelta),
        (KdaSection, spec.Kda),
        (AttentionSection, spec.Attention),
        (DenseSection, spec.Dense),
        (MoESection, spec.MoE),
        (ModelSection, spec.ModelSpec),
    ],
)
def test_the_model_section_has_the_fields_and_defaults_of_the_spec(section: type[Any], described: type[Any]) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(described)}
    fields = section.model_fields
    extra = {"gated_delta", "kda", "attention", "dense", "moe"} if section is ModelSection else set()
    assert set(fields) - extra == set(defaults)
    for name, default in defaults.items():
        assert fields[name].is_required() == (default is dataclasses.MISSING), name
        assert default is dataclasses.MISSING or fields[name].default == default, name


def test_the_model_section_builds_the_spec_it_describes() -> None:
    model = parse(small()).model_spec()
    delta, attention = spec.GatedDelta(2, 4, 8, 8), spec.Attention(4, 2, 8)
    moe = spec.MoE(4, 2, 16)
    mixed = (spec.LayerSpec(delta, moe), spec.LayerSpec(attention, moe))
    first = spec.LayerSpec(spec.Kda(2, 8, 4, gate_rank=5), spec.Dense(48))
    assert model == spec.ModelSpec(24, 257, (first, *mixed, *mixed))


@pytest.mark.parametrize(
    ("override", "key_class"),
    [
        ("run.seed=1", KeyClass.IDENTITY),
        ("model.width=32", KeyClass.IDENTITY),
        ("model.moe.top_k=1", KeyClass.IDENTITY),
        ("run.dtype=float64", KeyClass.IDENTITY),
        ("data.tokenizer=t.json", KeyClass.IDENTITY),
        ("run.steps=30", KeyClass.TRAJECTORY),
        ("train.lr=2e-3", KeyClass.TRAJECTORY),
        ("train.clip=null", KeyClass.TRAJECTORY),
        ("train.global_batch=24", KeyClass.TRAJECTORY),
        ("train.optimizer.eps=1e-9", KeyClass.TRAJECTORY),
        ("data.blend={data/a: 1, data/b: 1}", KeyClass.TRAJECTORY),
        ("train.micro_batch=2", KeyClass.OPERATIONAL),
        ("parallel=auto", KeyClass.OPERATIONAL),
        ("parallel.tp=2", KeyClass.OPERATIONAL),
        ("checkpoint.every=5", KeyClass.OPERATIONAL),
        ("log.every=5", KeyClass.OPERATIONAL),
    ],
)
def test_a_change_is_of_the_class_of_its_key(override: str, key_class: KeyClass) -> None:
    changes = diff(parse(small()), with_overrides(override))
    assert changes[key_class] and not any(changes[other] for other in KeyClass if other is not key_class)
    if key_class is KeyClass.OPERATIONAL:
        assert allowed_changes(parse(small()), with_overrides(override))


def test_no_change_is_no_change() -> None:
    assert not any(diff(parse(small()), parse(parse(small()).resolved())).values())


@pytest.mark.parametrize("allowed", ["train.lr", "train"])
def test_a_trajectory_key_needs_to_be_allowed_by_name_or_section(allowed: str) -> None:
    old = parse(small())
    with pytest.raises(Refusal, match=r"train\.lr: 0\.001 -> 0\.002.*run\.allow_change=\[train\.lr\]"):
        allowed_changes(old, with_overrides("train.lr=2e-3"))
    with pytest.raises(Refusal, match=r"allow_change=\[train\.clip\]"):
        allowed_changes(old, with_overrides("train.lr=2e-3", "train.clip=2", "run.allow_change=[train.lr]"))
    recorded = allowed_changes(old, with_overrides("train.lr=2e-3", f"run.allow_change=[{allowed}]"))
    assert [(c.key, c.old, c.new) for c in recorded][:1] == [("train.lr", 1e-3, 2e-3)]


def test_an_identity_key_cannot_be_allowed() -> None:
    with pytest.raises(Refusal, match=r"model\.width: 24 -> 32.*another run\.name"):
        allowed_changes(parse(small()), with_overrides("model.width=32", "run.allow_change=[train]"))


def test_wsd_rises_holds_and_falls_to_its_floor_at_the_end() -> None:
    schedule = ScheduleSection(kind="wsd", warmup_steps=4, decay_steps=5, min_ratio=0.1)
    shares = [schedule.multiplier(step, 20) for step in range(21)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4:16] == [1.0] * 12
    assert shares[16:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_cosine_follows_half_a_cosine_after_the_warm_up_and_stays_at_its_floor() -> None:
    schedule = ScheduleSection(kind="cosine", warmup_steps=10, decay_steps=80, min_ratio=0.2)
    for step in range(10, 90):
        expected = 0.2 + 0.8 * math.cos(math.pi * (step - 10) / 160) ** 2  # (1 + cos x) / 2 = cos^2(x / 2)
        assert schedule.multiplier(step, 100) == pytest.approx(expected, rel=1e-14)
    assert schedule.multiplier(95, 100) == pytest.approx(0.2)


@given(
    st.sampled_from(["wsd", "cosine"]),
    st.integers(0, 50),
    st.none() | st.integers(1, 50),
    st.floats(0, 1),
    st.integers(1, 60),
)
def test_the_schedule_stays_between_nothing_and_the_peak_whatever_the_length_of_the_run(
    kind: Any, warmup: int, decay: int | None, floor: float, steps: int
) -> None:
    schedule = ScheduleSection(kind=kind, warmup_steps=warmup, decay_steps=decay, min_ratio=floor)
    for step in range(steps):
        share = schedule.multiplier(step, steps)
        rise = (step + 1) / warmup if warmup else 1.0
        assert 0.0 < share <= 1.0 and share >= min(rise, floor) - 1e-12


def test_presets_are_listed_and_each_is_named_as_its_file() -> None:
    assert {"demo", "tiny-dense", "hybrid-1b", "hybrid-moe-30b-a3b", "hybrid-moe-235b-a22b"} <= set(presets())
    assert all(load(name).run.name == name for name in presets())
