"""The kernels against plain torch: time over their bare matrix products, memory against N, share of the copy bandwidth.

    python -m tests.benchmarks.bench_kernels [--sections gmm,gmm-memory] [--small]

With `--small` on a CPU: the reference against the chunked path, memory as resident pages of a child process.
"""

import json
import subprocess
import sys
from collections.abc import Callable

from model.kernels.dispatch import choose
from tests.benchmarks import bench_memory
from tests.benchmarks.bench_device import TIMING_HEAD, Device, gibibytes, share
from tests.benchmarks.bench_heads import HeadProblem, gmm_problem, text_problem
from tests.benchmarks.bench_plot import log_log_plot
from tests.benchmarks.bench_runner import main
from tests.benchmarks.bench_section import Context, Section

NAMES = ("peaks", "gmm", "gmm-memory", "cross-entropy", "elementwise")

TIME_AIM = 1.25
"""Times the bare products."""
MEMORY_AIM_GIB = 2.0
"""Above inputs, outputs and gradients, on a GPU."""
SMALL_MEMORY_AIM = 10.0
"""Times less than eager, at the largest N of a CPU."""
EAGER_AT_MOST = 16384
"""Tokens of the largest eager pass that is tried."""


def peaks(context: Context, section: Section) -> None:
    """The denominators of all shares below."""
    device = context.device
    found, sheet = device.peaks, device.data_sheet_flops()
    rows = [
        ["matrix product", f"{found.flops / 1e12:.4g} TFLOP/s", "-" if sheet is None else f"{share(found.flops, sheet)} of {sheet / 1e12:.0f}"],
        [f"copy of {gibibytes(device.copy_size)}, read and written", f"{found.copy_bytes / 1e9:.4g} GB/s", "-"],
    ]
    section.table("peaks", ["what", "measured", "data sheet"], rows)
    section.text("how", f"Product in {device.dtype} of normal random numbers, the fastest of {len(device.product_sizes)} shapes; copy: the median.")


def gmm(context: Context, section: Section) -> None:
    """The image head at the size of 1p3b."""
    measure_head(context, section, _gmm_at(context, 1024 if context.small else 8192))


def cross_entropy(context: Context, section: Section) -> None:
    """The text head at the size of 1p3b: half of 256 captions of 64 tokens."""
    sizes = {"tokens": 512, "width": 64, "vocab": 4096, "workspace_bytes": 2**21}
    if not context.small:
        sizes = {"tokens": 8192, "width": 1536, "vocab": 32_003, "workspace_bytes": 2**30}
    measure_head(context, section, text_problem(context.device, **sizes), with_eager=True)


def measure_head(context: Context, section: Section, problem: HeadProblem, *, with_eager: bool = False) -> None:
    """Time against the bare products, memory above what must stay, each implementation checked first."""
    device = context.device
    names = implementations(problem.name, device)
    section.text("shape", f"`{problem.name}`, forward and backward: {problem.shape}.")
    for name in names:
        section.item("checks", f"{name}: {problem.check(name)}")
        problem.forget_gradients()
        device.release()
    rows: list[list[str]] = []
    memory = {name: _extra_bytes(device, problem, name) for name in names}
    problem.forget_gradients()
    bare = problem.products()
    actions: dict[str, Callable[[], object]] = {**bare, **{name: problem.step(name) for name in names}}
    if with_eager:
        actions["reference"] = problem.step("reference")
    found = device.compare(actions, seconds=context.repeat_seconds(6.0))
    products = sum(found[name].median for name in bare)
    for name, timing in found.items():
        is_product = "product" in name
        rate = problem.flops * (1 if is_product else 3) / timing.median
        extra = gibibytes(memory[name]) if name in memory else "-"
        rows.append([name, *timing.cells(), f"{rate / 1e12:.3g}", share(rate, device.peaks.flops), "-", extra])
        if not is_product:
            rows[-1][6] = f"{timing.median / products:.2f}"
    rows.insert(3, ["the three products", f"{1e3 * products:.3f}", "", "", f"{3e-12 * problem.flops / products:.3g}", "", "1.00", "-"])
    section.table("time", ["what", *TIMING_HEAD, "TFLOP/s (3 products)", "of peak", "over the products", "memory above what stays"], rows)
    best = min(names, key=lambda name: found[name].median)
    section.text("note", "What stays: inputs, outputs, gradients. The products write to buffers that exist; the loss allocates its own.")
    if problem.name == "linear_gmm_nll_loss" and not context.small:
        section.bar("image head over its three products", aim=TIME_AIM, found=found[best].median / products, at_least=False, unit="x")
        section.bar("image head's memory above what stays", aim=MEMORY_AIM_GIB, found=memory[best] / 2**30, at_least=False, unit=" GiB")


def gmm_memory(context: Context, section: Section) -> None:
    """Memory above inputs, outputs and gradients, and time, as N doubles; eager as far as it fits."""
    device = context.device
    sizes = [1024, 2048, 4096, 8192] if context.small else [512, 1024, 2048, 4096, 8192, 16384, 32768]
    names = [*implementations("linear_gmm_nll_loss", device), "reference"]
    measured: dict[tuple[str, int], tuple[int, float]] = {}
    notes: dict[tuple[str, int], str] = {}
    for size in sizes:
        for name in names:
            if (name, size // 2) in notes or (name == "reference" and size > EAGER_AT_MOST):
                notes[name, size] = notes.get((name, size // 2), "not tried")
                continue
            try:
                measured[name, size] = _in_child(name, size) if context.small else _in_process(context, name, size)
            except Exception as error:
                if not device.is_out_of_memory(error):
                    raise
                notes[name, size] = "does not fit"
            device.release()
        rows = [_memory_row(names, one, measured, notes) for one in sizes if (names[0], one) in measured]
        section.table("memory", ["N", *(f"{name}: {what}" for name in names for what in ("memory", "ms")), "memory ratio", "time ratio"], rows)
    for number, (what, unit, scale) in enumerate((("memory above inputs, outputs, gradients", "MiB", 2**20), ("time", "ms", 1e-3))):
        lines = {name: [(size, pair[number] / scale) for (one, size), pair in sorted(measured.items()) if one == name] for name in names}
        plot = log_log_plot(f"Image head, forward and backward: {what}", lines, x_label="N, tokens", y_label=unit)
        section.plot(what.partition(" ")[0], plot)
    largest = max(size for name, size in measured if name == "reference")
    ratio = measured["reference", largest][0] / max(measured[names[0], largest][0], 1)
    how = "resident pages of a child process of one thread" if context.small else "allocated by torch"
    section.text(
        "note", f"{_gmm_at(context, 128).shape.partition(', ')[2]}; memory: {how}; ratios: reference over {names[0]}.", "Checked at every N."
    )
    if context.small:
        section.bar(f"reference's memory over {names[0]}'s, N={largest}", aim=SMALL_MEMORY_AIM, found=ratio, at_least=True, unit="x")


def implementations(name: str, device: Device) -> list[str]:
    """What can run here and is not the reference, the preferred one first."""
    operation = "gmm_nll" if "gmm" in name else "linear_cross_entropy"
    return list(dict.fromkeys([choose(operation, "auto", device.device, device.dtype), "torch"]))


def _gmm_at(context: Context, tokens: int) -> HeadProblem:
    return gmm_problem(context.device, tokens=tokens, **bench_memory.gmm_sizes(small=context.small))


def _extra_bytes(device: Device, problem: HeadProblem, name: str) -> int:
    problem.forget_gradients()
    return max(device.peak_bytes(lambda: problem.run(name)) - problem.owned_bytes, 0)


def _in_process(context: Context, name: str, size: int) -> tuple[int, float]:
    problem = _gmm_at(context, size)
    if name != "reference":
        problem.check(name)
    problem.step(name)()  # compiles, and makes the workspaces of the libraries
    extra = _extra_bytes(context.device, problem, name)
    return extra, context.device.time(problem.step(name), seconds=context.repeat_seconds(0.5)).median


def _in_child(name: str, size: int) -> tuple[int, float]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_memory", name, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}")
    values = json.loads(done.stdout.splitlines()[-1])
    return values["extra_bytes"], values["seconds"]


def _memory_row(names: list[str], size: int, measured: dict[tuple[str, int], tuple[int, float]], notes: dict[tuple[str, int], str]) -> list[str]:
    row = [f"{size}"]
    for name in names:
        if (name, size) in measured:
            row += [gibibytes(measured[name, size][0]), f"{1e3 * measured[name, size][1]:.2f}"]
        else:
            row += [notes.get((name, size), "-"), "-"]
    if (first := measured.get((names[0], size))) and (reference := measured.get(("reference", size))):
        return [*row, f"{reference[0] / max(first[0], 1):.1f}", f"{reference[1] / first[1]:.2f}"]
    return [*row, "-", "-"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default=NAMES, name="kernels", doc=__doc__))
