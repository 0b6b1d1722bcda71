"""Speeds and MFU follow from counts and the clock; the console line keeps its columns."""

import math

import pytest
import torch

from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, TextConfig
from model.flops import training_flops
from model.stats import METRICS
from pipeline import metrics
from pipeline.config import DataConfig, LogConfig, RunConfig
from pipeline.metrics import MetricsMeter, console_line, known_peak_tflops, peak_flops_per_second, peak_memory_gb

TINY = JetFormerConfig(
    image=ImageConfig(resolution=4, channels=1, patch_size=2),
    text=TextConfig(length=3, num_pieces=8),
    flow=FlowConfig(depth=1, block_depth=1, width=8, num_heads=2),
    decoder=DecoderConfig(width=8, depth=1, mlp_dim=16, num_heads=2, head_dim=4),
    gmm=GmmConfig(num_mixtures=2, soft_dim=2),
)
CONFIG = RunConfig(model=TINY, data=DataConfig(global_batch_size=10), log=LogConfig(peak_tflops=1e-6))
CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def sums_of(**values: tuple[float, float]) -> torch.Tensor:
    sums = torch.zeros(2, len(METRICS), dtype=torch.float64)
    for name, (total, count) in values.items():
        sums[:, METRICS.index(name)] = torch.tensor([total, count], dtype=torch.float64)
    return sums


def test_speeds_leave_out_saving_and_count_every_step() -> None:
    clock = Clock()
    meter = MetricsMeter(CONFIG, world_size=4, device=CPU, clock=clock)
    for _ in range(5):
        with meter.timed("data"):
            clock.wait(0.5)
        clock.wait(1.5)
        meter.step_done()
    with meter.excluded():
        clock.wait(1000)
    record = meter.record(5, sums_of(loss=(30.0, 10)), grad_norm=2.0, learning_rate=1e-3, sigma=64.0, extra={"image_bits_clean": 7.0})
    assert record["step_seconds"] == pytest.approx(2.0)
    assert record["data_seconds"] == pytest.approx(0.5)
    assert record["images_per_second"] == pytest.approx(5.0)
    assert record["tokens_per_second"] == pytest.approx(5.0 * TINY.sequence_length)
    assert record["mfu"] == pytest.approx(5.0 * training_flops(TINY) / (4 * 1e6))
    assert record["elapsed_seconds"] == pytest.approx(1010)
    assert (record["step"], record["samples"], record["loss"], record["image_bits_clean"]) == (5, 50, 3.0, 7.0)
    assert "text_nats" not in record  # nobody counted any


def test_every_record_starts_a_new_interval() -> None:
    clock = Clock()
    meter = MetricsMeter(CONFIG, world_size=1, device=CPU, clock=clock)
    for seconds in (1.0, 4.0):
        with meter.excluded():
            clock.wait(50)
        with meter.timed("data"):
            clock.wait(seconds)
        meter.step_done()
        record = meter.record(1, sums_of(), grad_norm=0.0, learning_rate=0.0, sigma=0.0)
        assert record["step_seconds"] == pytest.approx(seconds)
        assert record["data_seconds"] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Quadro K620", None),
    ],
)
def test_known_devices_have_the_peak_of_their_data_sheet(name: str, peak: float | None) -> None:
    assert known_peak_tflops(name) == peak


def test_an_unknown_device_is_measured_and_a_given_peak_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MEASURE_SECONDS", 0.01)
    assert 1e8 < peak_flops_per_second(CPU, "fp32") < 1e15
    assert peak_flops_per_second(CPU, "fp32", given_tflops=2.5) == 2.5e12


def test_memory_is_that_of_this_process() -> None:
    assert 0.05 < peak_memory_gb(CPU) < 100


FULL = {
    "step": 120,
    "loss": 3.41234,
    "image_bits": 5.8123,
    "text_nats": 2.3104,
    "grad_norm": 1.2345,
    "learning_rate": 1e-3,
    "sigma": 32.06,
    "images_per_second": 812.3,
    "tokens_per_second": 12_345.0,
    "mfu": 0.3123,
    "memory_gb": 1.23,
    "step_seconds": 0.5,
}


def test_the_console_line_is_readable() -> None:
    assert console_line(FULL, 3000) == (
        "step  120/3000  loss   3.4123  image  5.812 bits  text  2.310 nats  grad     1.23  lr 1.00e-03  sigma 32.1"
        "    812 img/s  12.3k tok/s  MFU 31.2%    1.2 GB  left  0:24:00"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"image_bits": None, "text_nats": None, "mfu": None},
        {"loss": math.nan, "grad_norm": math.inf},
        {"loss": -1234.5678, "grad_norm": 123456.0, "images_per_second": 1e6, "tokens_per_second": 999_999.0},
        {"images_per_second": 0.0123, "step_seconds": 1e4},
    ],
)
def test_columns_stay_in_place_whatever_the_values(change: dict[str, float | None]) -> None:
    line, full = console_line({**FULL, **change}, 3000), console_line(FULL, 3000)
    for label in ("loss", "image", "text", "grad", "lr", "sigma", "img/s", "tok/s", "MFU", "GB"):
        assert line.index(label) == full.index(label), line
