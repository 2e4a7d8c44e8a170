"""What an error says of its cause, by the very words of the CUDA runtime, its libraries, NCCL, torch and gloo."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain import run
from pretrain.config import RunConfig, load
from pretrain.diagnosis import EITHER, HARDWARE, DeviceError, device_error, lost_peer
from pretrain.rundir import begin, inspect, last_device

#: As torch 2.13 ends what it says of an error of CUDA.
ASYNCHRONOUS = (
    "\nSearch for `{}' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, {}, NCCL version 2.27.3\n{}"
UNHANDLED = "unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
CALL_FAILED = "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure {}"
WATCHDOG = (
    "[rank1]:[E817 17:40:34.227531918 ProcessGroupNCCL.cpp:1515] [PG 0 (default_pg) Rank 1] Process group watchdog "
    "thread terminated with exception: {}\n"
)
TIMED_OUT = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6463, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=1800000) ran for 1800017 milliseconds before timing out."
)


def accelerator(code: int) -> RuntimeError:
    """As torch raises it (torch/csrc/Exceptions.cpp): the text, and the number as an attribute."""
    name, text = (HARDWARE | EITHER)[code]
    error = torch.AcceleratorError(f"CUDA error: {text}{ASYNCHRONOUS.format(name)}")
    error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("code", [*HARDWARE, *EITHER])
def test_an_error_of_the_device_is_told_by_its_number_or_its_text(code: int) -> None:
    name, _ = (HARDWARE | EITHER)[code]
    expected = DeviceError(name, hardware=code in HARDWARE)
    assert device_error(str(accelerator(code))) == expected
    assert device_error("", code) == expected
    assert run._kind(accelerator(code)) == "device" and run._lost_peer(accelerator(code)) is None


def test_numbers_and_names_are_those_of_the_header() -> None:
    packages = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    headers = [packages / "nvidia/cu13/include", *Path("/usr/local").glob("cuda-13*/include")]
    header = next((path for folder in headers if (path := folder / "driver_types.h").exists()), None)
    if header is None:
        pytest.skip("no header of CUDA 13 here")
    found = {name: int(code) for name, code in re.findall(r"^\s*(cudaError\w+)\s*=\s*(\d+)", header.read_text(), re.M)}
    assert {name: code for code, (name, _) in (HARDWARE | EITHER).items()}.items() <= found.items()


def test_texts_are_those_of_the_runtime() -> None:
    library = next(Path("/usr/local").glob("cuda-13*/lib*/libcudart.so.13"), None)
    if library is None:
        pytest.skip("no runtime of CUDA 13 here")
    says = ctypes.CDLL(str(library)).cudaGetErrorString
    says.restype = ctypes.c_char_p
    assert {code: text for code, (_, text) in (HARDWARE | EITHER).items()} == {
        code: says(code).decode() for code in HARDWARE | EITHER
    }


SAID = {
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n)`"),
        "device", False,
    ),
    "cuBLAS after a hardware error": (
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasGemmEx( handle)`\nCUDA error: uncorrectable "
            "ECC error encountered\nCUDA kernel errors might be asynchronously reported at some other API call"
        ),
        "device", True,
    ),
    "cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device", False),
    "NCCL meets a device that failed": (
        dist.DistBackendError(NCCL.format(UNHANDLED, CALL_FAILED.format("214 'uncorrectable ECC error encountered'"))),
        "device", True,
    ),
    "NCCL as it said it until 2.18": (
        dist.DistBackendError(NCCL.format(UNHANDLED, CALL_FAILED.format("'unspecified launch failure'"))),
        "device", False,
    ),
    "the driver": (RuntimeError("NVRM: Xid (PCI:0000:06:00): 79, pid=1, GPU has fallen off the bus."), "device", True),
    "a call that NCCL makes wrongly": (
        dist.DistBackendError(NCCL.format(UNHANDLED, CALL_FAILED.format("1 'invalid argument'"))), "exception", None,
    ),
    "a program's own call": (torch.AcceleratorError("CUDA error: invalid configuration argument"), "exception", None),
    "wrong use of NCCL": (
        dist.DistBackendError(
            NCCL.format(
                "invalid usage (run with NCCL_DEBUG=WARN for details)",
                "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU "
                "detected : rank 1 and rank 0 both on CUDA device 1000",
            )
        ),
        "exception", None,
    ),
    "no room for memory that NCCL shares": (
        dist.DistBackendError(
            NCCL.format(
                "unhandled system error (run with NCCL_DEBUG=INFO for details)",
                "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
                "\nLast error:\nError while creating shared memory segment /dev/shm/nccl-VPyhzw (size 21823872), "
                "error: No space left on device (28)",
            )
        ),
        "exception", None,
    ),
    "torch's allocator": (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 4.00 "
            "GiB is free. Process 1 has 135.80 GiB memory in use."
        ),
        "oom", None,
    ),
    "the runtime's allocator": (torch.AcceleratorError("CUDA error: out of memory"), "oom", None),
    "cuBLAS's allocator": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom", None,
    ),
    "the driver is unloaded as the process ends": (
        torch.AcceleratorError("CUDA error: driver shutting down"), "exception", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_is_the_device_s_is_told_from_the_program_s_and_from_memory(name: str) -> None:
    error, kind, hardware = SAID[name]
    assert run._kind(error) == kind
    found = run._device_error(error)
    assert (found.hardware if found and kind == "device" else None) == hardware
    assert run._lost_peer(error) is None


GONE = (
    dist.DistBackendError(
        NCCL.format(
            "remote process exited or there was a network error",
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
            "Last error:\nsocketProgress: Connection closed by remote peer node-3<41022>",
        )
    ),
    dist.DistBackendError(
        NCCL.format(
            "unhandled system error (run with NCCL_DEBUG=INFO for details)",
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
            "\nLast error:\nCall to recv from 10.0.0.3<41022> failed : Software caused connection abort",
        )
    ),
    dist.DistBackendError("NCCL communicator was aborted on rank 1.  Original reason for failure was: timeout"),
    dist.DistBackendError(TIMED_OUT),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]:7"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv "
                 "operation to complete"),
    RuntimeError("Application timeout caused pair closure"),
)  # fmt: skip


@pytest.mark.parametrize("error", GONE)
def test_a_rank_that_lost_another_blames_nobody(error: RuntimeError) -> None:
    assert run._lost_peer(error) and run._device_error(error) is None


def test_of_a_rank_that_its_watchdog_ended_the_last_words_tell_why() -> None:
    device = device_error(WATCHDOG.format("CUDA error: uncorrectable ECC error encountered"))
    assert device == DeviceError("cudaErrorECCUncorrectable", hardware=True)
    assert lost_peer(WATCHDOG.format(TIMED_OUT)) and device_error(WATCHDOG.format(TIMED_OUT)) is None


@pytest.mark.parametrize(
    ("code", "same"), [(214, None), (700, "device, rank 3, cudaErrorIllegalAddress, step 17"), (999, None)]
)
def test_what_a_rank_writes_down_of_its_device_names_it_and_is_the_same_failure_only_where_it_may_be_the_program(
    code: int, same: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrote: list[dict[str, object]] = []
    monkeypatch.setattr(run, "_leave", lambda *told, **known: wrote.append(known | {"rank": told[-1]}))
    config: RunConfig = load("demo", [f"run.dir={tmp_path}"])
    run._blame(config, 1, 3, accelerator(code), 17)
    (found,) = wrote
    assert (found["kind"], found["rank"], found["step"], found["fingerprint"]) == ("device", 3, 17, same)


@pytest.mark.parametrize(
    ("error", "backend", "waits"),
    [
        (accelerator(214), "nccl", False),
        (ValueError("a program's own"), "nccl", True),
        (GONE[0], "nccl", False),
        (GONE[4], "gloo", True),
    ],
)
def test_after_an_error_of_the_device_or_the_loss_of_a_peer_of_nccl_nothing_is_asked_of_it_any_more(
    error: Exception, backend: str, waits: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*told: object) -> None:
        raise error

    destroyed: list[bool] = []
    monkeypatch.setattr(run, "_join", fails)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
    config = load("demo", [f"run.dir={tmp_path}"])
    assert run._attempt(config, run.World(0, 1, 0), None, run.Heartbeat(None)) == 1
    assert bool(destroyed) == waits


#: Devices that are there, whether the run had some before, whether an agent started the rank; code, and what is said.
MISSING = {
    "lost after a restart": (3, True, True, 1, "rank 3 has no CUDA device: it is number 3 on "),
    "all lost after a restart": (0, True, True, 1, "the run computed on them before"),
    "too many ranks from the first": (3, False, True, 2, "refused: rank 3 has no CUDA device: it is number 3 on "),
    "too many ranks of torchrun": (3, True, False, 2, "refused: rank 3 has no CUDA device: it is number 3 on "),
    "no device any more, by hand": (0, True, False, 2, "refused: rank 3 has no CUDA device: "),
    "never had one": (0, False, True, None, ""),
    "has its own": (4, True, True, None, ""),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_rank_without_its_device_says_so_itself_and_never_takes_gloo_for_nccl(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    devices, before, agent, code, text = MISSING[name]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for variable, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(variable, value)
    if agent:
        monkeypatch.setenv("STOKER_ATTEMPT", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    for step in ("validate", "_validate_device"):
        monkeypatch.setattr(run, step, lambda *told: None)
    monkeypatch.setattr(run, "_attempt", lambda *told: 77)
    arguments = ["demo", f"run.dir={tmp_path}"]
    if before:
        config = load(arguments[0], arguments[1:])
        begin(inspect(config), config, config.plan(1), device="cuda").close()
    assert run.main(arguments) == (77 if code is None else code)
    said = capfd.readouterr().err.strip()
    assert text in said and bool(said) == bool(text) and len(said.splitlines()) <= 1
    assert code != 1 or device_error(said) == DeviceError("GPU is lost", hardware=True)
    if before and not devices:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert run.main(arguments) == 77, "who wants the CPU says so"


@pytest.mark.parametrize(("backend", "device"), [("nccl", "cuda"), ("gloo", "cpu")])
def test_an_attempt_records_what_its_ranks_compute_on(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told, src: None)
    config = load("demo", [f"run.dir={tmp_path}"])
    attempt, _ = run._begin(config, run.World(0, 1, 0), inspect(config))
    assert attempt is not None
    attempt.close()
    assert last_device(config.run_dir) == device
