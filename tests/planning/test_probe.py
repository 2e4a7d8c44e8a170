"""What a machine says of itself is read as it is: nvidia-smi in recorded shapes, degraded fabrics, garbage, no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.planning.hardware import probe
from parallel.planning.hardware.probe import cpu_topology, fill_unknown, gpu_machine, parse_nvidia_smi, with_measured
from parallel.planning.topology import load_hardware, save_hardware
from stoker.errors import Refusal

RACK = "dc6e40c4-d722-4357-9ba6-5291dd461278"
NO_CLUSTER = "00000000-0000-0000-0000-000000000000"


def listing(*gpus: str) -> str:
    """What ``nvidia-smi -q`` prints around the GPUs, abridged."""
    head = "\n==============NVSMI LOG==============\n\nTimestamp              : Sat Nov 22 10:00:00 2026\n"
    return (
        f"{head}Driver Version         : 580.173.02\nCUDA Version           : 13.0\n\nAttached GPUs          : 8\n"
        + "".join(f"GPU 00000008:0{index}:00.0\n{gpu}\n" for index, gpu in enumerate(gpus))
    )


def gpu(name: str, mib: int | None, fabric: str = "") -> str:
    memory = f"{mib} MiB" if mib else "Not Supported"
    return f"""    Product Name                          : {name}
    MIG Mode
        Current                           : Disabled
    FB Memory Usage
        Total                             : {memory}
        Reserved                          : 500 MiB
        Used                              : 1 MiB
    BAR1 Memory Usage
        Total                             : 262144 MiB
    Clocks
        Graphics                          : 1965 MHz
{fabric}    Processes                             : None"""


def fabric(
    state: str = "Completed", status: str = "Success", cluster: str = RACK, clique: str = "2", **health: str
) -> str:
    lines = {
        "Summary": "Healthy",
        "Bandwidth": "Full",
        "Route Recovery in progress": "False",
        "Route Unhealthy": "False",
        "Access Timeout Recovery": "False",
        "Incorrect Configuration": "None",
    } | {key.replace("_", " "): value for key, value in health.items()}
    return f"""    Fabric
        State                             : {state}
        Status                            : {status}
        CliqueId                          : {clique}
        ClusterUUID                       : {cluster}
        Health
""" + "".join(f"            {key:<30}: {value}\n" for key, value in lines.items())


def machine(*gpus: str) -> probe.Machine:
    return gpu_machine(parse_nvidia_smi(listing(*gpus)))


def test_a_tray_of_a_rack_is_its_whole_domain() -> None:
    found = machine(*4 * [gpu("NVIDIA GB300", 284208, fabric())])
    assert not found.warnings and {(one.cluster_uuid, one.clique) for one in found.gpus} == {(RACK, "2")}
    assert found.topology == load_hardware("gb300-nvl72")
    assert found.topology.sources["device.memory_bytes"].tag == "measured"


def test_an_8_gpu_host_is_its_own_domain() -> None:
    found = machine(*8 * [gpu("NVIDIA H100 80GB HBM3", 81559, fabric(cluster=NO_CLUSTER, clique="0"))])
    assert not found.warnings and found.topology == load_hardware("h100")
    assert found.gpus[0].cluster_uuid is None


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H800", "h800"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
    ],
)
def test_a_part_of_a_host_keeps_the_speeds_and_shrinks_the_domain(name: str, preset: str) -> None:
    found = machine(gpu(name, 100000)).topology
    full = load_hardware(preset)
    assert found.device.peak_flops == full.device.peak_flops and found.domain.bandwidth == full.domain.bandwidth
    assert (found.domain.size, found.domain.per_host, found.domain.practice, found.spares) == (1, 1, (1,), 0)
    assert found.device.memory_bytes == 100000 * 2**20


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 5090"]
)
def test_a_part_without_a_preset_is_unknown_and_not_taken_for_a_sibling(name: str) -> None:
    found = machine(gpu(name, 32607), gpu(name, 32607))
    assert any("has no preset" in words for words in found.warnings)
    assert found.topology.device.name == name.removeprefix("NVIDIA ") and found.topology.domain.size == 2
    with pytest.raises(Refusal, match="no peak is known for bfloat16"):
        found.topology.peak("bfloat16")
    with pytest.raises(Refusal, match=r"domain\.bandwidth is unknown"):
        found.topology.known("domain.bandwidth")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (fabric(status="Insufficient Resources", cluster=NO_CLUSTER, clique="0"), "Status Insufficient Resources"),
        (fabric(state="In Progress", status="N/A", cluster="N/A", clique="N/A"), "State In Progress"),
        (fabric(state="In Progress"), "State In Progress"),
    ],
)
def test_a_fabric_that_did_not_come_up_leaves_the_tray_alone(broken: str, words: str) -> None:
    found = machine(*3 * [gpu("NVIDIA GB200", 189471, fabric())], gpu("NVIDIA GB200", 189471, broken))
    assert found.topology.domain.size == 4 and found.topology.domain.practice == (4,)
    assert any(words in line and line.startswith("GPU 3") for line in found.warnings)
    assert any("taken to be this host, not the 72" in line for line in found.warnings)


def test_a_degraded_fabric_stays_a_rack_and_is_said() -> None:
    degraded = fabric(Summary="Limited Capacity", Bandwidth="Degraded")
    found = machine(gpu("NVIDIA GB200", 189471, degraded), *3 * [gpu("NVIDIA GB200", 189471, fabric())])
    assert found.topology.domain.size == 72
    assert found.warnings == ("GPU 0 (GB200), NVLink fabric: Summary Limited Capacity; Bandwidth Degraded",)


def test_trays_of_two_partitions_are_not_one_domain() -> None:
    found = machine(
        *2 * [gpu("NVIDIA GB200", 189471, fabric())], *2 * [gpu("NVIDIA GB200", 189471, fabric(clique="3"))]
    )
    assert found.topology.domain.size == 4 and "2 cliques" in found.warnings[0]


def test_a_driver_that_reports_no_health_is_not_called_broken() -> None:
    silent = fabric(**dict.fromkeys(("Summary", "Bandwidth", "Route_Unhealthy"), "Not Supported"))
    assert not machine(*4 * [gpu("NVIDIA GB200", 189471, silent)]).warnings


def test_the_least_memory_of_unequal_gpus_counts_and_an_unreported_one_does_not() -> None:
    found = machine(gpu("NVIDIA H200", 143771), gpu("NVIDIA H200", 143000), gpu("NVIDIA H200", None))
    assert found.topology.device.memory_bytes == 143000 * 2**20


def test_different_gpus_are_refused() -> None:
    with pytest.raises(Refusal, match="A100-SXM4-80GB, H200"):
        machine(gpu("NVIDIA H200", 143771), gpu("NVIDIA A100-SXM4-80GB", 81920))


@pytest.mark.parametrize(
    "text", ["", "No devices were found\n", "GPU 0\n", "GPU 00000000:01:00.0\n", "Product Name : X"]
)
def test_what_is_no_listing_has_no_gpu(text: str) -> None:
    assert parse_nvidia_smi(text) == ()


@given(st.text(alphabet=st.sampled_from("GPU 0:1.\n\tFabric Product Name MiB/-"), max_size=300))
def test_garbage_is_read_without_an_error(text: str) -> None:
    parse_nvidia_smi(text)
    parse_nvidia_smi(listing(text))


def test_a_core_is_a_device_with_its_share_of_the_memory() -> None:
    found = cpu_topology(6, 12e9, "a processor")
    assert (found.domain.size, found.device.memory_bytes, found.device.processors) == (6, 2e9, 1)
    with pytest.raises(Refusal, match="stoker plan calibrate"):
        found.known("device.memory_bandwidth")


def test_measurements_fill_what_is_unknown_and_nothing_else(tmp_path: Path) -> None:
    here = cpu_topology(2, 8e9, "a processor")
    numbers = {"device.peak_flops.float32": 5e10, "domain.bandwidth": 1e9, "device.memory_bytes": 1.0}
    save_hardware(tmp_path / "machine.yaml", with_measured(here, numbers, "torch 2.13"))
    filled = fill_unknown(here, load_hardware(str(tmp_path / "machine.yaml")))
    assert (filled.peak("float32"), filled.domain.bandwidth, filled.device.memory_bytes) == (5e10, 1e9, 4e9)
    assert filled.sources["domain.bandwidth"].text == "torch 2.13"
    assert filled.device.memory_bandwidth is None
    with pytest.raises(Refusal, match="measured on a processor, and this machine has another"):
        fill_unknown(cpu_topology(2, 8e9, "another"), filled)
    with pytest.raises(KeyError, match=r"domain\.speed"):
        with_measured(here, {"domain.speed": 1.0}, "")


class Answer:
    def __init__(self, code: int, out: str = "", err: str = "") -> None:
        self.returncode, self.stdout, self.stderr = code, out, err

    def __call__(self, *command: Any, **options: Any) -> Answer:
        return self


def missing(*command: Any, **options: Any) -> Answer:
    raise FileNotFoundError("nvidia-smi")


def test_the_survey_asks_nvidia_smi_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Answer(0, listing(*8 * [gpu("NVIDIA H200", 143771)])))
    assert probe.probe() == load_hardware("h200")


def test_a_broken_driver_is_said_and_the_processors_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "run", Answer(9, err="NVIDIA-SMI has failed because it couldn't talk to the driver\n")
    )
    found = probe.survey()
    assert found.topology.name == "cpu" and "couldn't talk to the driver" in found.warnings[0]
    monkeypatch.setattr(subprocess, "run", missing)
    assert probe.survey().warnings == ()


def test_a_container_has_the_memory_that_it_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", missing)
    limit, unlimited = tmp_path / "memory.max", tmp_path / "unlimited"
    limit.write_text("1000000000\n")
    unlimited.write_text("max\n")
    monkeypatch.setattr(probe, "MEMORY_LIMITS", (limit, unlimited))
    here = probe.probe()
    assert here.device.memory_bytes == pytest.approx(1e9 / here.domain.size)
