"""Time, memory and peak rates of one device: CUDA, and a CPU form of the same calls so that every benchmark can be tried anywhere.

Times are of single calls: CUDA events around the call alone, or the wall clock on a CPU. Before each timed call a buffer larger than the
last-level cache is overwritten, so that no input is there from the call before. What is compared runs turn by turn.
"""

import ctypes
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from pipeline.metrics import known_peak_tflops

MIN_ROUNDS, MAX_ROUNDS = 5, 50
"""Turns of a comparison."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, measured several times."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """Seconds."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def cells(self) -> list[str]:
        """Median, fastest, spread: of a table whose columns say ms."""
        return [f"{1e3 * self.median:.3f}", f"{1e3 * self.fastest:.3f}", f"{self.spread:.0%}"]


TIMING_HEAD = ["median ms", "fastest ms", "spread"]


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the device does at best, measured in this process."""

    flops: float
    """FLOP/s of a large product in the dtype of training, fastest of some shapes, of normal random numbers: zeros would run faster."""
    copy_bytes: float
    """Bytes read and written per second by a copy far larger than the caches."""


class Device:
    """A CPU. `CudaDevice` overrides what differs."""

    flush_bytes, copy_size = 2**25, 2**26
    product_sizes: tuple[tuple[int, int, int], ...] = ((512, 512, 512),)

    def __init__(self, kind: str = "cpu") -> None:
        self.device = torch.device(kind)
        self.dtype = torch.float32
        """Of the weights in training here."""

    @property
    def is_cuda(self) -> bool:
        """Whether figures are worth quoting."""
        return self.device.type == "cuda"

    def describe(self) -> str:
        """Device and versions."""
        names = [line.split(":", 1)[1].strip() for line in _proc("/proc/cpuinfo").splitlines() if line.startswith("model name")]
        return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads; {versions()}"

    def synchronise(self) -> None:
        """Waits for the device."""

    def seconds(self, action: Callable[[], object]) -> float:
        """One call."""
        self._flush_buffer.zero_()
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def release(self) -> None:
        """Gives memory that nothing uses back to the device."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def peak_bytes(self, action: Callable[[], object]) -> int:
        """Most memory that an action held above what was held before: of this process's resident pages here, allocated by torch on CUDA."""
        self.release()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
        result = action()
        peak = _status_bytes("VmHWM") - before
        del result
        return max(peak, 0)

    def held_bytes(self) -> int:
        """Memory held now: of this process's resident pages here, allocated by torch on CUDA."""
        return _status_bytes("VmRSS")

    def total_bytes(self) -> int:
        """Memory of the device."""
        return _meminfo_bytes("MemTotal")

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error means that the shape does not fit."""
        signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
        return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs)

    def data_sheet_flops(self) -> float | None:
        """Dense bf16 peak that the maker states."""
        return None

    def compare(
        self, actions: Mapping[str, Callable[[], object]], *, seconds: float, warm_up: int = 2, at_least: int = MIN_ROUNDS
    ) -> dict[str, Timing]:
        """Times of each action, turn by turn, for about `seconds` in all and `at_least` so many rounds.

        Args:
            warm_up: calls of each before; 0 where they were called already, and the rounds are then `at_least`.
        """
        once, once_more = 0.0, math.inf
        for action in actions.values():
            for _ in range(warm_up):
                once_more = self.seconds(action)
            once += once_more
        rounds = int(min(max(seconds / max(once, 1e-6), at_least), MAX_ROUNDS))
        found: dict[str, list[float]] = {name: [] for name in actions}
        for turn in range(rounds):
            names = list(actions) if turn % 2 == 0 else list(actions)[::-1]
            for name in names:
                found[name].append(self.seconds(actions[name]))
        return {name: Timing(tuple(values)) for name, values in found.items()}

    def time(self, action: Callable[[], object], *, seconds: float, warm_up: int = 2) -> Timing:
        """Times of one action."""
        return self.compare({"": action}, seconds=seconds, warm_up=warm_up)[""]

    @cached_property
    def peaks(self) -> Peaks:
        """Measured at the first question; about a second."""
        best = 0.0
        for rows, columns, inner in self.product_sizes:
            generator = torch.Generator(self.device).manual_seed(0)
            a = torch.randn(rows, inner, device=self.device, generator=generator).to(self.dtype)
            b = torch.randn(inner, columns, device=self.device, generator=generator).to(self.dtype)
            out = torch.empty(rows, columns, device=self.device, dtype=self.dtype)
            best = max(best, 2 * rows * columns * inner / self.time(partial(torch.mm, a, b, out=out), seconds=0.3).fastest)
        return Peaks(flops=best, copy_bytes=2 * self.copy_size / self.copy_timing(self.copy_size).median)

    def copy_timing(self, size: int) -> Timing:
        """A copy of `size` bytes."""
        source = torch.ones(max(size // 4, 1), device=self.device)
        target = torch.empty_like(source)
        return self.time(lambda: target.copy_(source), seconds=0.2)

    @cached_property
    def _flush_buffer(self) -> torch.Tensor:
        return torch.empty(self.flush_bytes, dtype=torch.int8, device=self.device)


class CudaDevice(Device):
    """The current CUDA device."""

    flush_bytes, copy_size = 2**28, 2**30
    product_sizes = ((8192, 8192, 8192), (16384, 8192, 4096), (4096, 4096, 16384))

    def __init__(self) -> None:
        super().__init__("cuda")
        self.dtype = torch.bfloat16

    def describe(self) -> str:
        """Device and versions."""
        return f"{torch.cuda.get_device_name()}, {self.total_bytes() / 2**30:.0f} GiB; CUDA {torch.version.cuda}; {versions()}"

    def synchronise(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object]) -> float:
        """One call, between two events; flush and sleep before it give the host a head start of half a millisecond for its launches."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush_buffer.zero_()
        torch.cuda._sleep(800_000)  # clock cycles; of torch's own tests
        start.record()
        action()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def release(self) -> None:
        """Gives memory that nothing uses back to the device."""
        gc.collect()
        torch.cuda.empty_cache()

    def peak_bytes(self, action: Callable[[], object]) -> int:
        """Most memory that an action held above what was held before."""
        self.release()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = action()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak

    def held_bytes(self) -> int:
        """Memory held now."""
        return torch.cuda.memory_allocated()

    def total_bytes(self) -> int:
        """Memory of the device."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def data_sheet_flops(self) -> float | None:
        """Dense bf16 peak that the maker states."""
        known = known_peak_tflops(torch.cuda.get_device_name())
        return None if known is None else known * 1e12


def open_device(*, small: bool) -> Device:
    """The CUDA device, or with `small` the CPU."""
    return Device() if small else CudaDevice()


def versions() -> str:
    """Python, torch and what it may use."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("triton", "deepspeed", "liger-kernel", "apex"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def share(part: float, whole: float) -> str:
    """For a table."""
    return f"{part / whole:.0%}"


def gibibytes(size: float) -> str:
    """Bytes as GiB, or MiB below a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _proc(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _status_bytes(name: str) -> int:
    return _field_bytes(_proc("/proc/self/status").splitlines(), name)


def _meminfo_bytes(name: str) -> int:
    return _field_bytes(_proc("/proc/meminfo").splitlines(), name)


def _field_bytes(lines: Sequence[str], name: str) -> int:
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
