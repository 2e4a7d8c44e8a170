"""What NVIDIA's tools print of sick GPUs, in the shapes that drivers 535 to 580 print it, and what follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.preflight import gpu
from parallel.planning.hardware.probe import parse_nvidia_smi
from tests.launch.preflight.needs import GB, need
from tests.planning.test_probe import fabric

WELL = """    Product Name                          : NVIDIA H100 80GB HBM3
    GPU UUID                              : GPU-{uuid}
    MIG Mode
        Current                           : Disabled
        Pending                           : Disabled
    Performance State                     : P0
    Clocks Event Reasons
        Idle                              : Active
        Applications Clocks Setting       : Not Active
        SW Power Cap                      : Not Active
        HW Slowdown                       : Not Active
            HW Thermal Slowdown           : Not Active
            HW Power Brake Slowdown       : Not Active
        Sync Boost                        : Not Active
        SW Thermal Slowdown               : Not Active
        Display Clock Setting             : Not Active
    FB Memory Usage
        Total                             : 81559 MiB
        Reserved                          : 551 MiB
        Used                              : 0 MiB
        Free                              : 81007 MiB
    ECC Mode
        Current                           : Enabled
        Pending                           : Enabled
    ECC Errors
        Volatile
            SRAM Correctable              : 0
            SRAM Uncorrectable Parity     : 0
            SRAM Uncorrectable SEC-DED    : 0
            DRAM Correctable              : 4
            DRAM Uncorrectable            : 0
        Aggregate
            SRAM Correctable              : 0
            SRAM Uncorrectable Parity     : 0
            SRAM Uncorrectable SEC-DED    : 0
            DRAM Correctable              : 17
            DRAM Uncorrectable            : 0
            SRAM Threshold Exceeded       : No
        Aggregate Uncorrectable SRAM Sources
            SRAM L2                       : 0
            SRAM SM                       : 0
    Retired Pages
        Single Bit ECC                    : N/A
        Double Bit ECC                    : N/A
        Pending Page Blacklist            : N/A
    Remapped Rows
        Correctable Error                 : 0
        Uncorrectable Error               : 0
        Pending                           : No
        Remapping Failure Occurred        : No
        Bank Remap Availability Histogram
            Max                           : 2560 bank(s)
{fabric}    Processes                             : None
"""
#: As drivers before Ampere's row remapping print it.
OLDER = """    Product Name                          : Tesla V100-SXM2-32GB
    Clocks Throttle Reasons
        HW Slowdown                       : Active
            HW Thermal Slowdown           : Not Active
            HW Power Brake Slowdown       : Active
    ECC Mode
        Current                           : Enabled
    ECC Errors
        Volatile
            Double Bit
                Device Memory             : 2
                Register File             : 1
                Total                     : 3
    Retired Pages
        Single Bit ECC                    : 0
        Double Bit ECC                    : 1
        Pending Page Blacklist            : Yes
"""


def listing(*gpus: str) -> str:
    head = "\n==============NVSMI LOG==============\n\nDriver Version                            : 580.95.05\n"
    return head + "".join(f"GPU 00000000:{5 + index:02X}:00.0\n{text}\n" for index, text in enumerate(gpus))


def one(index: int = 0, **changes: str) -> str:
    """A GPU that is well but for these lines: {start of a key: value}, the n-th of that name by ``key#n``."""
    text = WELL.replace("{uuid}", f"{index:08d}").replace("{fabric}", fabric(cluster="N/A", clique="N/A"))
    lines = text.splitlines(keepends=True)
    for key, value in changes.items():
        name, _, nth = key.replace("_", " ").partition("#")
        found = [i for i, line in enumerate(lines) if line.strip().partition(":")[0].strip() == name]
        line = lines[found[int(nth or 0)]]
        lines[found[int(nth or 0)]] = f"{line.partition(': ')[0]}: {value}\n"
    return "".join(lines)


def told(*gpus: str) -> list[tuple[str, str, str]]:
    return [(found.check, found.status, found.found) for found in gpu.health(listing(*gpus))]


def test_gpus_that_are_well_are_one_line() -> None:
    assert told(*[one(i) for i in range(8)]) == [("GPUs", "ok", "8: memory, clocks and fabric are well")]
    assert gpu.uuids(listing(one(0), one(1))) == ("GPU-00000000", "GPU-00000001")


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"DRAM Uncorrectable": "1"}, "refuse", "1 uncorrectable memory errors since the driver was loaded"),
        ({"SRAM Uncorrectable Parity": "2"}, "refuse", "2 uncorrectable"),
        ({"SRAM Uncorrectable SEC-DED#1": "3"}, "warn", "3 uncorrectable memory errors in its life"),
        ({"SRAM Threshold Exceeded": "Yes"}, "refuse", "over the vendor's threshold"),
        ({"Remapping Failure Occurred": "Yes"}, "refuse", "could not be remapped"),
        ({"Pending#2": "Yes"}, "refuse", "waits to be mapped out"),
        ({"Current#1": "Disabled"}, "warn", "ECC is off"),
        ({"HW Slowdown": "Active", "HW Thermal Slowdown": "Active"}, "refuse", "HW Slowdown, HW Thermal Slowdown"),
        ({"SW Thermal Slowdown": "Active"}, "warn", "for its temperature"),
        ({"Used": "40960 MiB"}, "warn", "40960 MiB of its memory are in use"),
        ({"Current": "Enabled"}, "warn", "MIG"),
        ({"State": "In Progress"}, "refuse", "State In Progress"),
        ({"Bandwidth": "Degraded"}, "warn", "Bandwidth Degraded"),
        ({"Route Unhealthy": "True"}, "refuse", "Route Unhealthy True"),
    ],
)
def test_each_fault_is_named_with_its_gpu(change: dict[str, str], status: str, says: str) -> None:
    (found,) = told(one(0), one(1, **change), one(2))
    assert found[:2] == ("GPU 1", status) and says in found[2]


def test_drivers_of_older_gpus_say_it_in_other_words() -> None:
    found = told(OLDER)
    assert ("GPU 0", "refuse", "3 uncorrectable memory errors since the driver was loaded") in found
    assert ("GPU 0", "refuse", "damaged memory waits to be mapped out") in found
    assert ("GPU 0", "refuse", "slowed down by its hardware: HW Power Brake Slowdown, HW Slowdown") in found


def test_gpus_of_one_host_in_two_partitions_are_refused() -> None:
    tray = [one(i).replace("H100 80GB HBM3", "GB200") for i in range(2)]
    uuid = "dc6e40c4-d722-4357-9ba6-5291dd461278"
    text = listing(
        *(
            t.replace("ClusterUUID                       : N/A", f"ClusterUUID                       : {uuid}")
            for t in tray
        )
    ).replace("CliqueId                          : N/A", "CliqueId                          : 2", 1)
    assert any("of several NVLink partitions" in found.found for found in gpu.health(text))
    assert gpu.clique_of(parse_nvidia_smi(text)) == (uuid, "2")
    assert gpu.clique_of(parse_nvidia_smi(listing(one()))) is None


def links(up: int, down: int = 0, crc: int = 0) -> tuple[str, str]:
    status = [f"\t Link {i}: 26.562 GB/s" for i in range(up)] + [f"\t Link {up + i}: <inactive>" for i in range(down)]
    errors = [f"\t Link {i}: {kind} Errors: 0" for i in range(up) for kind in ("Replay", "Recovery")]
    return "\n".join(status), "\n".join([*errors, f"\t Link 0: CRC Errors: {crc}"])


def test_links_that_are_down_or_err_are_found() -> None:
    def printed(*gpus: tuple[str, str]) -> tuple[str, str]:
        heads = [f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i:08d})" for i in range(len(gpus))]
        return tuple("\n".join(f"{h}\n{g[k]}" for h, g in zip(heads, gpus)) for k in (0, 1))  # type: ignore[return-value]

    assert [f.found for f in gpu.nvlink(*printed(links(18), links(18)))] == ["18 links a GPU are up"]
    (down,) = gpu.nvlink(*printed(links(18), links(17, down=1)))
    assert (down.check, down.status, down.found) == ("GPU 1", "refuse", "17 of 18 NVLinks are up")
    (errs,) = gpu.nvlink(*printed(links(18, crc=41), links(18)))
    assert (errs.check, errs.status, errs.found) == ("GPU 0", "warn", "NVLink: 41 CRC Errors")
    assert gpu.nvlink("", "") == []


def imex(status: str, *nodes: str) -> str:
    """As ``nvidia-imex-ctl -N -j`` prints it."""
    members = {str(i): {"status": state, "host": f"10.0.0.{i}"} for i, state in enumerate(nodes)}
    return json.dumps({"nodes": members, "status": status})


def test_imex_must_have_a_channel_and_its_domain_up(tmp_path: Path) -> None:
    (missing,) = gpu.imex(channels=tmp_path / "none")
    assert missing.status == "refuse" and "no channel" in missing.found
    (tmp_path / "channel0").write_text("")

    def answer(text: str) -> tuple[str, str]:
        (found,) = gpu.imex(lambda *command: text, tmp_path)
        return found.status, found.found

    assert answer(imex("UP", "READY", "READY")) == ("ok", "the domain of 2 nodes is up")
    assert answer(imex("DEGRADED", "READY", "UNAVAILABLE")) == (
        "refuse",
        "the domain is DEGRADED, not ready: 10.0.0.1",
    )
    assert answer(imex("DOWN"))[0] == "refuse" and answer("not JSON")[0] == "refuse"

    def absent(*command: str) -> str:
        raise FileNotFoundError

    assert gpu.imex(absent, tmp_path)[0].status == "warn"


def test_a_tool_that_fails_is_told_with_its_first_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory: 'nowhere'"):
        gpu.ask("nowhere")
    with pytest.raises(OSError, match=r"ls --nothing failed: ls: unrecognized option"):
        gpu.ask("ls", "--nothing")
    with pytest.raises(OSError, match=r"sleep did not answer in 0\.1 s"):
        gpu.ask("sleep", "60", timeout_s=0.1)


def test_a_model_that_cannot_lie_in_gpu_memory_is_refused() -> None:
    gpus = parse_nvidia_smi(listing(one(0), one(1)))
    (refused,) = gpu.memory(need(state_bytes=200 * GB, peak_bytes=220 * GB), gpus)
    assert refused.status == "refuse" and "85.52 GB, and the model's state alone takes 100 GB" in refused.found
    assert gpu.memory(need(state_bytes=100 * GB, peak_bytes=200 * GB), gpus)[0].status == "warn"
    assert gpu.memory(need(state_bytes=100 * GB, peak_bytes=150 * GB), gpus)[0].status == "ok"
