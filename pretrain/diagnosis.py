"""What the text of an error says of its cause: a device that failed, memory that ran out, another rank that is gone.

For the rank that raised it (``run.py``) and for the agent that reads what a rank printed last. No torch. The texts are
those of torch 2.13 (c10/cuda/CUDAException.cpp, ProcessGroupNCCL.cpp), CUDA 13.0 (cudaGetErrorString), NCCL 2.28
(ncclGetErrorString, checks.h) and gloo. Nothing here was seen on a GPU that failed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Errors that a device reports of itself, number: (name, text). The hardware, a link or the driver of that node is to
#: blame, as NVIDIA describes them. driver_types.h of CUDA 13.0 (August 2025); the text is cudaGetErrorString's.
HARDWARE = {
    46: ("cudaErrorDevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"),
    100: ("cudaErrorNoDevice", "no CUDA-capable device is detected"),
    214: ("cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"),
    220: ("cudaErrorNvlinkUncorrectable", "uncorrectable NVLink error detected during the execution"),
    226: ("cudaErrorContained", "Invalid access of peer GPU memory over nvlink or a hardware error"),
    802: ("cudaErrorSystemNotReady", "system not yet initialized"),
    803: ("cudaErrorSystemDriverMismatch", "system has unsupported display driver / cuda driver combination"),
    911: ("cudaErrorExternalDevice", "an async error has occured in external entity outside of CUDA"),
    999: ("cudaErrorUnknown", "unknown error"),
}
#: Errors of a device that are as often the program's: an index out of range, a kernel that is wrong. Of 719 the header
#: says "common causes include dereferencing an invalid device pointer", "less common cases can be system specific".
#: 4 (driver shutting down) is in neither: it comes when the process itself ends.
EITHER = {
    700: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    702: ("cudaErrorLaunchTimeout", "the launch timed out and was terminated"),
    710: ("cudaErrorAssert", "device-side assert triggered"),
    714: ("cudaErrorHardwareStackError", "hardware stack error"),
    715: ("cudaErrorIllegalInstruction", "an illegal instruction was encountered"),
    716: ("cudaErrorMisalignedAddress", "misaligned address"),
    717: ("cudaErrorInvalidAddressSpace", "operation not supported on global/shared address space"),
    718: ("cudaErrorInvalidPc", "invalid program counter"),
    719: ("cudaErrorLaunchFailure", "unspecified launch failure"),
    721: ("cudaErrorTensorMemoryLeak", "tensor memory not completely freed"),
}
_BY_TEXT = {text: name for name, text in (HARDWARE | EITHER).values()}
_HARDWARE_NAMES = {name for name, _ in HARDWARE.values()}
#: torch's check of a call of the runtime, and NCCL's ("Cuda failure 214 'uncorrectable ...'").
_RUNTIME = re.compile(r"CUDA error: (?P<torch>[^\n]+)|Cuda failure (?:\d+ )?'(?P<nccl>[^'\n]+)'")
#: What the libraries say when a kernel of theirs failed: by itself it says no more than 719.
_LIBRARY = re.compile(r"\bCU(?:BLAS|DNN|SPARSE|SOLVER)_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)\b")
#: What a rank of Stoker says that is to have a GPU and sees none.
NO_DEVICE = "has no CUDA device"
#: The driver, where it can no longer talk to the device (Xid 79; NVML_ERROR_GPU_IS_LOST).
_GONE = re.compile(rf"fallen off the bus|GPU is lost|{NO_DEVICE}", re.IGNORECASE)

#: What gloo and NCCL say when the other end of a connection is no longer there, or was waited for in vain; and what a
#: rank says whose own watchdog then ends it (SIGABRT). ncclSystemError alone says nothing of others: memory that cannot
#: be shared and files that cannot be opened are that too.
PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection closed by remote peer",
    "Broken pipe",
    "Application timeout caused pair closure",
    "for recv operation to complete",
    "for send operation to complete",
    "remote process exited",
    "ncclRemoteError",
    "Call to recv from",
    "Call to send to",
    "NCCL communicator was aborted",
    "NCCL timeout in communicator initialization",
    "Watchdog caught collective operation timeout",
    "ProcessGroupNCCL's watchdog got stuck",
    "Observed flight recorder dump signal from another rank",
)
#: What torch, its libraries and the allocators below it say when there is no memory, where they raise a RuntimeError.
NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class DeviceError:
    """An error of a device: its ``name``; ``hardware``: the program is not to blame."""

    name: str
    hardware: bool


def device_error(text: str, code: int | None = None) -> DeviceError | None:
    """The error of a device that ``text`` reports, or ``code`` is (``torch.AcceleratorError.error_code``); None where
    neither is one. Of several one of hardware counts, else the first: a device that failed answers every later call
    with an error."""
    found = [name for number, (name, _) in (HARDWARE | EITHER).items() if number == code]
    for reported in _RUNTIME.finditer(text):
        if name := _BY_TEXT.get((reported["torch"] or reported["nccl"]).strip()):
            found.append(name)
    found += [library[0] for library in _LIBRARY.finditer(text)]
    if _GONE.search(text):
        found.append("GPU is lost")
    for name in found:
        if name in _HARDWARE_NAMES or name == "GPU is lost":
            return DeviceError(name, hardware=True)
    return DeviceError(found[0], hardware=False) if found else None


def lost_peer(text: str) -> str | None:
    """The line that says that another rank is gone; None where none does."""
    return next((line for line in text.splitlines() if any(sign in line for sign in PEER_IS_GONE)), None)


def no_memory(text: str) -> bool:
    return any(sign in text for sign in NO_MEMORY)


def device_fingerprint(error: DeviceError, rank: int, step: int | None) -> str | None:
    """Equal for two failures of a device that are the same; None where hardware fails, which is no failure of the run.
    Without the place: a kernel's error is raised by any later call."""
    return None if error.hardware else f"device, rank {rank}, {error.name}, step {step}"
