"""Times of GPU work: replays of a CUDA graph between events, the second-level cache emptied before each."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch

#: Runs of which the median is taken; fewer where they would take longer than SECONDS, and a call that takes that long
#: itself is run once more after the first, no more.
RUNS, SECONDS = 100, 2.0
#: Written before every run; larger than the second-level cache of any GPU to date (B200: 126 MB, its tuning guide).
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """``ms``: the median; ``spread``: distance of the quartiles over it. ``graph_refused``: why no CUDA graph was
    replayed, the calls themselves being timed; empty if one was. ``clock`` is None where nobody says."""

    ms: float
    spread: float = 0.0
    runs: int = 1
    graph_refused: str = ""
    clock: Clock | None = None

    def __str__(self) -> str:
        how = f"launched call by call ({self.graph_refused})" if self.graph_refused else "CUDA graph"
        return f"{self.runs} runs, spread {self.spread:.1%}, {how}, {self.clock or 'clock unknown'}"


@dataclass(frozen=True)
class Clock:
    """Of the multiprocessors, and the board's power draw, read while the measured work was running."""

    sm_mhz: int
    watts: float

    def __str__(self) -> str:
        return f"{self.sm_mhz} MHz, {self.watts:.0f} W"


class Timer(Protocol):
    def __call__(self, call: Callable[[], object]) -> Timing:
        """Of a function of nothing, which leaves its work on the current stream."""

    def stream(self) -> AbstractContextManager[None]:
        """Where forwards run whose backward is timed: autograd runs a backward on the stream of its forward."""


class GraphTimer:
    """The Timer of the current CUDA device."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._meter = Meter(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)

    @contextmanager
    def stream(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def __call__(self, call: Callable[[], object]) -> Timing:
        with self.stream():
            call()
            (once_ms,), clock = self._times(call, 1)
            if once_ms >= 1e3 * SECONDS:
                return Timing(once_ms, graph_refused="too slow to repeat", clock=clock)
            replay, refused = self._captured(call)
            times, clock = self._times(replay, max(2, min(RUNS, int(1e3 * SECONDS / once_ms))))
        low, _, high = quantiles(times, n=4)
        middle = median(times)
        return Timing(middle, (high - low) / middle, len(times), refused, clock)

    def _captured(self, call: Callable[[], object]) -> tuple[Callable[[], object], str]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                call()
        except Exception as error:  # whatever a peer does that a graph cannot hold
            torch.cuda.synchronize()
            return call, f"no graph: {first_line(error)}"
        return graph.replay, ""

    def _times(self, call: Callable[[], object], runs: int) -> tuple[list[float], Clock | None]:
        """Milliseconds of each run. All are queued before the first is waited for: the host is never in the time."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin, end in events:
            self._flushed.zero_()
            begin.record()
            call()
            end.record()
        events[runs // 2][0].synchronize()
        clock = self._meter.read()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events], clock


class Meter:
    """Clock and power of one device, by NVML; changes nothing."""

    def __init__(self, uuid: object) -> None:
        """``uuid``: as torch's device properties have it."""
        self._device = ctypes.c_void_p()
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            self._failed = True
            return
        name = f"GPU-{uuid}".encode()
        self._failed = bool(
            self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._device))
        )

    def read(self) -> Clock | None:
        """None where NVML does not answer."""
        mhz, milliwatts, multiprocessors = ctypes.c_uint(), ctypes.c_uint(), 1
        if (
            self._failed
            or self._nvml.nvmlDeviceGetClockInfo(self._device, multiprocessors, ctypes.byref(mhz))
            or self._nvml.nvmlDeviceGetPowerUsage(self._device, ctypes.byref(milliwatts))
        ):
            return None
        return Clock(mhz.value, milliwatts.value / 1e3)


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
