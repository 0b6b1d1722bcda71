"""Where the time of one step goes: kernels by kind, the longest of them, the share in which the device waits."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from tests.benchmarks.bench_device import Device
from tests.benchmarks.bench_section import Section

KINDS = (
    ("attention", r"flash|fmha|attention|attn|sdpa|cudnn"),
    ("matrix products", r"gemm|cutlass|xmma|nvjet|cublas|splitk|aten::(add)?mm\b|aten::bmm|aten::linear|mkldnn"),
    ("compiled by torch", r"^triton_"),
    ("optimiser", r"adam|multi_tensor"),
    ("copies", r"memcpy|memset|copy|CatArray|aten::(cat|clone|fill_|zero_|contiguous)"),
    ("sums and norms", r"reduce|layer_norm(?!_(?:fwd|bwd)_kernel$)|norm_kernel|softmax|aten::(sum|mean|logsumexp|native_layer_norm|_foreach_norm)"),
    ("our kernels", r"^_?[a-z0-9_]+(_kernel|_fwd|_bwd)[a-z0-9_]*$"),
    ("elementwise", r"elementwise|vectorized|unrolled|at::native|aten::"),
)
"""Kind -> what the names of its kernels hold; the first that matches counts."""
LONGEST = 12
EXPECTED = ("matrix products", "attention")
"""Time well spent; the next bottleneck is the largest of the others."""


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel on the device."""

    name: str
    start: float
    seconds: float


def profile_step(action: Callable[[], object], device: Device, section: Section, key: str) -> None:
    """Profiles one call and adds its tables to a section."""
    spans = record(action, device)
    total = sum(span.seconds for span in spans)
    if not total:
        section.text(f"profile {key}", "(the profiler saw no kernel)")
        return
    by_kind = sum_by(spans, lambda span: kind_of(span.name))
    idle = idle_share(spans) if device.is_cuda else None
    rows = [[kind, f"{1e3 * seconds:.2f}", f"{seconds / total:.1%}"] for kind, seconds in by_kind]
    section.table(f"kinds {key}", ["kind of kernel", "ms", "share of busy time"], rows)
    by_name = sum_by(spans, lambda span: span.name)
    counts: dict[str, int] = defaultdict(int)
    for span in spans:
        counts[span.name] += 1
    rows = [
        [shorten(name), kind_of(name), f"{counts[name]}", f"{1e3 * seconds:.2f}", f"{seconds / total:.1%}"] for name, seconds in by_name[:LONGEST]
    ]
    section.table(f"kernels {key}", ["kernel", "kind", "calls", "ms", "share"], rows)
    lines = [] if idle is None else [f"Idle: {idle:.1%} of the time between the first kernel and the end of the last."]
    lines.append(next_bottleneck(by_kind, by_name, idle))
    section.text(f"bottleneck {key}", *lines)


def record(action: Callable[[], object], device: Device) -> list[Span]:
    """Every kernel of one call; on a CPU every operator's own time."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if device.is_cuda else [ProfilerActivity.CPU]
    device.synchronise()
    with profile(activities=activities) as profiler:
        action()
        device.synchronise()
    if not device.is_cuda:
        return [Span(event.key, 0.0, event.self_cpu_time_total / 1e6) for event in profiler.key_averages() if event.self_cpu_time_total > 0]
    results = profiler.profiler.kineto_results.events()
    cuda = torch.autograd.DeviceType.CUDA
    return [
        Span(event.name(), event.start_ns() / 1e9, event.duration_ns() / 1e9)
        for event in results
        if event.device_type() == cuda and not getattr(event, "is_user_annotation", lambda: False)()
    ]


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def sum_by(spans: Iterable[Span], key: Callable[[Span], str]) -> list[tuple[str, float]]:
    """(key, seconds), longest first."""
    sums: dict[str, float] = defaultdict(float)
    for span in spans:
        sums[key(span)] += span.seconds
    return sorted(sums.items(), key=lambda pair: -pair[1])


def idle_share(spans: Sequence[Span]) -> float:
    """Share of the time from the first start to the last end in which no kernel ran; streams may overlap."""
    busy, end = 0.0, -float("inf")
    first = min(span.start for span in spans)
    for span in sorted(spans, key=lambda span: span.start):
        stop = span.start + span.seconds
        busy += max(0.0, stop - max(end, span.start))
        end = max(end, stop)
    return 1.0 - busy / (end - first) if end > first else 0.0


def next_bottleneck(by_kind: Sequence[tuple[str, float]], by_name: Sequence[tuple[str, float]], idle: float | None) -> str:
    """One sentence: the largest part that is neither a matrix product nor attention."""
    total = sum(seconds for _, seconds in by_kind)
    others = [(kind, seconds) for kind, seconds in by_kind if kind not in EXPECTED]
    if not others:
        return "Next bottleneck: none but matrix products and attention."
    kind, seconds = others[0]
    if idle is not None and idle > seconds / total * (1 - idle):
        return f"Next bottleneck: the device waits for the host {idle:.0%} of the time."
    name = next(name for name, _ in by_name if kind_of(name) == kind)
    return f"Next bottleneck: {kind}, {seconds / total:.0%} of the busy time, longest `{shorten(name)}`."


def shorten(name: str, length: int = 80) -> str:
    """A kernel's name without template arguments beyond what tells it apart."""
    name = re.sub(r"\s+", " ", name.replace("|", "/").replace("`", "'"))
    return name if len(name) <= length else f"{name[: length - 23]}...{name[-20:]}"
