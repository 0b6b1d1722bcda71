"""One record per logged step, from reduced sums and this process's clock, and the console line that shows it.

Units: seconds, images and tokens per second of the whole run, MFU as a share of one, memory in GB (10^9 bytes) of one device.
"""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from model.flops import training_flops
from model.stats import summarise
from pipeline.config import RunConfig

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
)
"""Part of a device's name -> dense bf16 TFLOP/s of its data sheet; the first that matches counts."""

MEASURE_SECONDS = 0.2
"""How long the products that measure an unknown device run."""


def peak_flops_per_second(device: torch.device, precision: str, *, given_tflops: float | None = None) -> float:
    """Dense peak of one device, the denominator of MFU.

    `given_tflops` if there is one; the data sheet of a known GPU (bf16); otherwise the rate of a large matrix product measured here, with the
    threads of this process on a CPU.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda" and precision == "bf16":
        known = known_peak_tflops(torch.cuda.get_device_name(device))
        if known is not None:
            return known * 1e12
    return _measure_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak by device name; None for a device that PEAK_TFLOPS does not list."""
    return next((peak for part, peak in PEAK_TFLOPS if part.lower() in device_name.lower()), None)


def _measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    size = 512 if device.type == "cpu" else 8192
    a, b = torch.full((size, size), 0.5, device=device, dtype=dtype), torch.full((size, size), 0.25, device=device, dtype=dtype)
    best, start = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - start < MEASURE_SECONDS:
        _synchronise(device)
        before = time.perf_counter()
        a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - before)
    return 2.0 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far: allocated by torch on a GPU, resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class MetricsMeter:
    """Times the steps between two records and turns sums into a record. One per run, on the rank that logs."""

    def __init__(self, config: RunConfig, *, world_size: int, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        """Measures the device's peak once, if it is not known: about 0.2 s.

        Args:
            clock: seconds, monotone; replaceable for tests.
        """
        self._config, self._world_size, self._device, self._clock = config, world_size, device, clock
        self._flops_per_image = training_flops(config.model)
        self._peak = peak_flops_per_second(device, config.parallel.precision, given_tflops=config.log.peak_tflops)
        self._begin = self._interval_start = clock()
        self._excluded = 0.0
        self._parts: dict[str, float] = {}
        self._num_steps = 0

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts what happens inside as `<name>_seconds` of the step, for example `data`."""
        start = self._clock()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + self._clock() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Keeps what happens inside (saving, evaluating, sampling) out of the speeds."""
        start = self._clock()
        try:
            yield
        finally:
            self._excluded += self._clock() - start

    def step_done(self) -> None:
        """Counts one optimiser step."""
        self._num_steps += 1

    def record(
        self,
        step: int,
        sums: Tensor,
        *,
        grad_norm: float,
        learning_rate: float,
        sigma: float,
        extra: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """The record of the steps since the last one, and a new interval.

        Args:
            step: optimiser steps done.
            sums: fp64 [2, metrics] of model.stats in the last of those steps, reduced over all ranks.
            sigma: RGB noise in grey levels.
            extra: further values to record as they are.
        """
        now = self._clock()
        seconds = max(now - self._interval_start - self._excluded, 1e-9)
        num_steps = max(self._num_steps, 1)
        images_per_second = num_steps * self._config.data.global_batch_size / seconds
        record: dict[str, Any] = {
            "step": step,
            "samples": step * self._config.data.global_batch_size,
            **summarise(sums),
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate,
            "sigma": sigma,
            "step_seconds": seconds / num_steps,
            **{f"{name}_seconds": value / num_steps for name, value in self._parts.items()},
            "images_per_second": images_per_second,
            "tokens_per_second": images_per_second * self._config.model.sequence_length,
            "mfu": images_per_second * self._flops_per_image / (self._world_size * self._peak),
            "memory_gb": peak_memory_gb(self._device),
            "elapsed_seconds": now - self._begin,
            **(extra or {}),
        }
        self._interval_start, self._excluded, self._num_steps = now, 0.0, 0
        self._parts.clear()
        return record


def console_line(record: Mapping[str, Any], total_steps: int) -> str:
    """One line of fixed columns; a value that the record lacks shows as `-`."""
    step = record["step"]
    remaining = (total_steps - step) * record.get("step_seconds", math.nan)
    width = len(str(total_steps))
    columns = (
        f"step {step:>{width}}/{total_steps}",
        f"loss {_number(record, 'loss', '.4f', 8)}",
        f"image {_number(record, 'image_bits', '.3f', 6)} bits",
        f"text {_number(record, 'text_nats', '.3f', 6)} nats",
        f"grad {_number(record, 'grad_norm', '.3g', 8)}",
        f"lr {_number(record, 'learning_rate', '.2e', 8)}",
        f"sigma {_number(record, 'sigma', '.1f', 4)}",
        f"{_short(record.get('images_per_second')):>5} img/s",
        f"{_short(record.get('tokens_per_second')):>5} tok/s",
        f"MFU {_number(record, 'mfu', '.1%', 5)}",
        f"{_number(record, 'memory_gb', '.1f', 5)} GB",
        f"left {_duration(remaining):>8}",
    )
    return "  ".join(columns)


def _number(record: Mapping[str, Any], name: str, form: str, width: int) -> str:
    value = record.get(name)
    text = "-" if value is None else format(value, form)
    return f"{text if len(text) <= width else format(value, '.1e'):>{width}}"


def _short(value: float | None) -> str:
    """Three significant digits with k, M, G."""
    if value is None or not math.isfinite(value):
        return "-"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}" if value < 999.5 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h{minutes:02d}m" if days else f"{hours}:{minutes:02d}:{rest:02d}"
