"""Hardware files: every number has a source and a unit, what is unknown is refused where it is needed, and the presets
say what the vendors and published systems say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallel.planning.topology import (
    PRESETS,
    SCHEMA,
    HardwareTopology,
    hardware_names,
    load_hardware,
    save_hardware,
    to_fields,
)
from stoker.errors import Refusal

TB, TF = 1e12, 1e12
#: FLOP/s in bfloat16 and fp8, memory in MiB, memory and link bandwidth (one way) in bytes/s, domain, network in Gb/s:
#: from the vendors' tables, written down apart from the files.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "a100-80gb": (312e12, None, 81920, 2.039 * TB, 300e9, 8, 200),
    "a100-40gb": (312e12, None, 40960, 1.555 * TB, 300e9, 8, 200),
    "h100": (989e12, 1979e12, 81559, 3.35 * TB, 450e9, 8, 400),
    "h200": (989e12, 1979e12, 143771, 4.8 * TB, 450e9, 8, 400),
    "h800": (989e12, 1979e12, 81559, 3.35 * TB, 200e9, 8, 400),
    "b200": (2250e12, 4500e12, 183359, 7.7 * TB, 900e9, 8, 400),
    "b300": (2250e12, 4500e12, 275040, 7.7 * TB, 900e9, 8, 800),
    "gb200-nvl72": (2450e12, 4900e12, 189471, 8 * TB, 900e9, 72, 400),
    "gb300-nvl72": (2450e12, 4900e12, 284208, 8 * TB, 900e9, 72, 800),
    "trainium1": (190e12, 190e12, 32 * 1024, 0.82 * TB, 192e9, 16, 50),
    "trainium2": (667e12, 1299e12, 96 * 1024, 2.9 * TB, 512e9, 16, 200),
    "mi300x": (1307.4e12, 2614.9e12, 192 * 1024, 5.3 * TB, 448e9, 8, 400),
    "mi355x": (2516.6e12, 5033.2e12, 288 * 1024, 8 * TB, 537.6e9, 8, 400),
}


@pytest.mark.parametrize("name", hardware_names())
def test_every_number_of_every_preset_has_a_source(name: str) -> None:
    topology = load_hardware(name)
    values, sources = to_fields(topology)
    assert topology.name == name
    for path, value in values.items():
        if SCHEMA[path] not in ("word", "flag") and value is not None:
            assert sources[path].text and sources[path].date, path
            assert sources[path].url or sources[path].tag in ("known", "assumed"), path


@pytest.mark.parametrize("name", [name for name in hardware_names() if name != "cpu"])
def test_accelerators_state_all_that_a_prediction_needs(name: str) -> None:
    topology = load_hardware(name)
    for path, unit in SCHEMA.items():
        if unit not in ("word", "flag", "counts") and not path.startswith(("device.peak_flops", "device.power_w")):
            assert topology.known(path) > 0 or path == "spares", path
    assert topology.peak("bfloat16") == topology.peak("float16") >= 2 * topology.peak("float32")


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_say_what_is_published(name: str) -> None:
    topology = load_hardware(name)
    flops, fp8, mib, memory_bandwidth, link, size, network_gb = PUBLISHED[name]
    assert topology.peak("bfloat16") == pytest.approx(flops)
    assert topology.device.peak_flops.get("fp8") == (pytest.approx(fp8) if fp8 else None)
    assert topology.device.memory_bytes == mib * 2**20
    assert topology.device.memory_bandwidth == pytest.approx(memory_bandwidth)
    assert topology.domain.bandwidth == pytest.approx(link) and topology.domain.size == size
    assert topology.network.bandwidth == pytest.approx(network_gb * 1e9 / 8)


def test_blackwell_ultra_has_more_fp4_and_the_same_of_the_rest() -> None:
    for plain, ultra in (("b200", "b300"), ("gb200-nvl72", "gb300-nvl72")):
        one, other = load_hardware(plain), load_hardware(ultra)
        assert other.peak("nvfp4") == 1.5 * one.peak("nvfp4")
        assert other.peak("mxfp8") == one.peak("mxfp8") and other.peak("bfloat16") == one.peak("bfloat16")


def test_a_rack_of_72_is_used_as_64_with_two_trays_spare() -> None:
    for name in ("gb200-nvl72", "gb300-nvl72"):
        topology = load_hardware(name)
        assert topology.rack_scale and topology.domain.per_host == 4 and topology.domain.practice == (64, 72)
        assert topology.domain.size - topology.spares == 64
    assert not load_hardware("h100").rack_scale


def test_meshes_and_tori_are_not_switched() -> None:
    unswitched = {name for name in hardware_names() if not load_hardware(name).domain.switched}
    assert unswitched == {"mi300x", "mi350x", "mi355x", "trainium1", "trainium2"}


def test_a_peak_that_is_not_there_is_refused_and_a_block_scaled_one_runs_at_fp8() -> None:
    topology = load_hardware("h100")
    assert topology.peak("fp8_block") == topology.peak("fp8")
    with pytest.raises(Refusal, match=r"h100: no peak is known for nvfp4; known are .*fp8"):
        topology.peak("nvfp4")
    with pytest.raises(Refusal, match="cpu: no peak is known for float32; known are none: `stoker plan calibrate`"):
        load_hardware("cpu").peak("float32")


@pytest.mark.parametrize(
    ("name", "guess"),
    [("gb200", "gb200-nvl72"), ("a100", "a100-40gb or a100-80gb"), ("h10", "h100 or h100-96gb-500w"), ("b302", "b300")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, guess: str) -> None:
    with pytest.raises(Refusal, match=rf"no hardware '{name}'\. Did you mean {guess}\?"):
        load_hardware(name)


@pytest.mark.parametrize("name", hardware_names())
def test_what_is_written_is_read_back_equal(name: str, tmp_path: Path) -> None:
    topology = load_hardware(name)
    save_hardware(tmp_path / "mine.yaml", topology)
    again = load_hardware(str(tmp_path / "mine.yaml"))
    assert again == topology and hash(again) == hash(topology)
    assert again.sources == topology.sources and again.device.peak_flops == topology.device.peak_flops


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    save_hardware(path, load_hardware("h100"))
    assert load_hardware(str(path)).name == "h100"
    save_hardware(path, replace(load_hardware("h100"), name="other"))
    assert load_hardware(str(path)).name == "other"


Damage = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file["device"].pop("power_w"), r"device\.power_w: is missing"),
        (
            lambda file: file["domain"].update(bandwith=1),
            r"domain\.bandwith: is not known: did you mean domain\.bandwidth",
        ),
        (lambda file: file["network"].update(bandwidth=400), r"network\.bandwidth: wants \{value"),
        (lambda file: file["network"]["bandwidth"].update(value="400 Gbit"), "must be a number, a space and one of"),
        (lambda file: file["network"]["bandwidth"].update(value="0 Gb/s"), "must be above zero"),
        (lambda file: file["network"]["bandwidth"].update(value=5e10), "must be a number, a space and one of"),
        (lambda file: file["network"]["bandwidth"].pop("source"), "names its source, one of .*; found None"),
        (lambda file: file["network"]["bandwidth"].update(source="nobody"), "found 'nobody'"),
        (lambda file: file["domain"]["size"].update(value=8.5), r"domain\.size: 8\.5 must be a whole number"),
        (lambda file: file["domain"]["size"].update(value=6), "hosts of 8 devices do not make up a domain of 6"),
        (lambda file: file["domain"]["practice"].update(value=[16]), r"practice \(16,\) must ascend within 1 to 8"),
        (lambda file: file["spares"].update(value=8), "spares=8 must be whole hosts of 8, and not all"),
        (lambda file: file["domain"].update(switched="yes"), r"domain\.switched: 'yes' must be true or false"),
        (lambda file: file.pop("sources"), "sources: must be a table"),
        (lambda file: file["sources"].update(bad={"text": "x", "tag": "sure"}), "sources.bad: wants text and a tag"),
        (lambda file: file["device"]["peak_flops"].update(int8={}), r"device\.peak_flops\.int8: is not known"),
        (lambda file: file.update(format={"name": "topology", "version": 2}), "by a newer release"),
        (lambda file: file.pop("format"), "no readable format stamp"),
    ],
)
def test_a_damaged_file_is_refused_by_file_and_field(damage: Damage, words: str, tmp_path: Path) -> None:
    content = yaml.safe_load((PRESETS / "h100.yaml").read_text())
    damage(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(Refusal, match=words) as refusal:
        load_hardware(str(path))
    assert str(path) in str(refusal.value) or "h100" in str(refusal.value)


def test_text_that_is_no_hardware_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text in ("{", "- a\n", "", "\x00"):
        path.write_text(text)
        with pytest.raises(Refusal, match=re.escape(str(path))):
            load_hardware(str(path))
    with pytest.raises(Refusal, match="is not there"):
        load_hardware(str(tmp_path / "none.yaml"))


def test_topologies_are_cache_keys_that_differ_with_their_numbers() -> None:
    h100 = load_hardware("h100")
    richer: HardwareTopology = replace(h100, device=replace(h100.device, memory_bytes=1e12))
    assert len({h100, richer, load_hardware("h200")}) == 3


def test_planning_hardware_needs_no_heavy_library() -> None:
    names = "topology, placement; from parallel.planning.hardware import settings, probe"
    code = f"import sys; from parallel.planning import {names}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PRESETS.parents[2], check=True
    )
    heavy = {"torch", "megatron", "numba", "zarr", "wandb", "pydantic", "scipy"}
    assert "parallel.planning.hardware.probe" in done.stdout.split() and not heavy & set(done.stdout.split())
