"""A whole training step of the published image-text models: images/s, MFU, memory, and what each part contributes.

    python -m tests.benchmarks.bench_step [--sections ablation,step-1p3b] [--small]

MFU: model FLOPs of spec 1.13 (exact skips left out, no recomputation counted) over the dense peak measured in the same process.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.batch import Batch
from model.config import JetFormerConfig
from model.flops import training_flops
from model.kernels.dispatch import choose, explain
from pipeline.config import Recompute
from tests.benchmarks.bench_batches import random_batches
from tests.benchmarks.bench_device import Device, Timing, gibibytes, share
from tests.benchmarks.bench_runner import main
from tests.benchmarks.bench_section import Context, Section, breaks_device, describe_error
from tests.benchmarks.bench_step_loop import REFERENCE, PlainStep, Step, build_step, largest_micro_batch, miniature, published, run_config
from tests.benchmarks.bench_step_profile import profile_step

NAMES = ("ablation", "step-350m", "step-1p3b")
MFU_AIM = 0.5
MOST = 256
"""Examples of the largest micro-batch that is tried."""
ROUNDS = 3
"""Steps that are timed at least, after two that are not."""
SAME_LOSS, SAME_NORM = 0.01, 0.05
"""How far two implementations may be apart in bf16, relatively: loss and gradient norm of one step."""
STEP_HEAD = ["recomputation", "micro-batch", "median s", "fastest s", "spread", "images/s", "MFU", "MFU (data sheet)", "peak memory"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One configuration at one micro-batch size."""

    timing: Timing
    images: int
    """Per step."""
    peak_bytes: int
    """In all: weights, optimiser, activations."""


@dataclass(frozen=True, slots=True)
class Largest:
    """What a search for the largest micro-batch found."""

    size: int
    """Examples; 0: not even one fits."""
    seconds: float
    """Of a step at that size."""
    is_whole: bool
    """False: a larger one may fit, but the time ran out or none was to be tried."""

    def __str__(self) -> str:
        if self.is_whole:
            return f"{self.size}"
        return f"at least {self.size}" if self.size else "not known, as the time ran out"


RECOMPUTATIONS: tuple[Recompute, ...] = ("none", "flow", "full")
"""The smallest micro-batches, and so the shortest steps, first."""


def step_350m(context: Context, section: Section) -> None:
    """The 350m model through the engine."""
    whole_step(context, section, "350m")


def step_1p3b(context: Context, section: Section) -> None:
    """The 1p3b model through the engine."""
    whole_step(context, section, "1p3b")


def whole_step(context: Context, section: Section, size: str) -> None:
    """Largest micro-batch with all, some and no recomputation, its speed, and a profile of the fastest."""
    device, model = context.device, miniature() if context.small else published(size)
    device.peaks  # noqa: B018 - measured before the memory is full
    micro_batches = 2
    config = run_config(context, model, micro_batches=micro_batches)
    step = build_step(config, device, section)
    flops = training_flops(model)
    section.text(
        "what", f"{step.name}; {micro_batches} micro-batches a step; {config.parallel.precision}; {flops / 1e9:.4g} GFLOP an image (spec 1.13)."
    )
    chosen = ", ".join(f"{one.operation} {one.implementation}" for one in explain(device.device.type, device.dtype))
    section.text("kernels", f"Kernels: {chosen}.")
    rows: list[list[str]] = []
    best: tuple[float, Recompute, int] = (0.0, "full", 1)
    warm_up(context, step, model, micro_batches)
    for recompute in RECOMPUTATIONS:
        step.stage.recompute = recompute
        largest = search(context, step, model, start=2 if context.small else 4, seconds=context.seconds_left * 0.2)
        section.item("largest", f"Recomputation `{recompute}`: the largest micro-batch that fits, to an eighth, is {largest}.")
        for micro in dict.fromkeys([largest.size, largest.size // 2]):
            needed = (ROUNDS + 2) * largest.seconds * micro / max(largest.size, 1)
            if micro and rows and context.seconds_left < needed:
                section.item("largest", f"Recomputation `{recompute}`, micro-batch {micro}: not measured, the time ran out.")
            elif micro:
                measured = measure(context, step, batches_of(context, model, micro, micro_batches))
                rows.append([recompute, f"{micro}", *step_cells(measured, flops, device)])
                section.table("steps", STEP_HEAD, rows)
                best = max(best, (measured.images / measured.timing.median, recompute, micro))
    speed, step.stage.recompute, micro = best
    if size == "1p3b" and not context.small:
        section.bar(f"MFU of {size}, one GPU", aim=MFU_AIM, found=speed * flops / device.peaks.flops, at_least=True, unit="")
    batches = batches_of(context, model, micro, micro_batches)
    section.text("profiled", f"Profile of one step at micro-batch {micro}, recomputation `{best[1]}`:")
    profile_step(lambda: step.run(batches), device, section, "step")


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the ablation."""

    name: str
    changes: dict[str, Any]
    """Of the kernels of the row that it adds to."""
    model: JetFormerConfig
    same_loss: bool = True
    """Computes what plain torch computes."""
    adds_up: bool = True
    """Stands in all rows after it."""
    padded: bool = False
    """On captions of all lengths, whose unused slots are masked (`text.ignore_pad`); the published runs read and score those as well."""


def ablation(context: Context, section: Section) -> None:
    """From plain torch everywhere to everything on, one part after the other, at one micro-batch size; then without the exact skips."""
    device, model = context.device, miniature() if context.small else published("350m")
    device.peaks  # noqa: B018 - measured before the memory is full
    micro_batches = 2
    config = run_config(context, model, micro_batches=micro_batches, kernels=REFERENCE)
    # At a learning rate of 0 the update costs the same, and every row sees the same weights.
    step = PlainStep(replace(config, optimizer=replace(config.optimizer, learning_rate=0.0)), device)
    warm_up(context, step, model, micro_batches)
    largest = search(context, step, model, start=2 if context.small else 8, seconds=context.seconds_left * 0.15)
    if not largest.size:
        raise RuntimeError("not one micro-batch of the reference fits")
    micro = max(1, largest.size // 2)  # at the very largest the allocator would slow plain torch down, and nothing else
    batches = batches_of(context, model, micro, micro_batches)
    section.text(
        "what",
        f"{step.name}; recomputation; {micro_batches} micro-batches of {micro} a step (with plain torch {largest} fit).",
        "Rows with `+` add up, and `adds` is images/s over the row before; the others are each compared with the last of those.",
        "Agreement: loss and gradient norm of the same step against the first row's, relatively.",
    )
    rows: list[list[str]] = []
    expected = step.gradient_norm(batches)
    kernels, before, full, built = REFERENCE, None, None, None
    for variant in variants(context, model):
        if before is not None and context.seconds_left < (40 if "compile" in variant.changes else 5):
            section.item("left out", f"{variant.name}: time ran out")
            continue
        try:
            config = replace(step.config, kernels=replace(kernels, **variant.changes), model=variant.model)
            built = step if before is None else PlainStep(config, device, like=step)
            inputs = batches_of(context, model, micro, micro_batches, padded=True) if variant.padded else batches
            found = built.gradient_norm(inputs)
            apart = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
            if variant.same_loss and not (apart[0] <= SAME_LOSS and apart[1] <= SAME_NORM):
                raise AssertionError(f"loss and gradient norm {found}, plain torch's {expected}: not timed")
            measured = measure(context, built, inputs)
        except Exception as error:
            step.recover()
            section.item("left out", f"{variant.name}: {describe_error(error)}")
            if before is None or breaks_device(error):
                raise
            built = None
        device.release()
        if built is None:
            continue
        speed = measured.images / measured.timing.median
        gain = "-" if before is None else f"{speed / before - 1:+.0%}"
        agreement = f"{apart[0]:.0e}, {apart[1]:.0e}" if variant.same_loss else "another loss"
        rows.append([variant.name, gain, *step_cells(measured, training_flops(variant.model), device), agreement])
        section.table("rows", ["what", "adds", *STEP_HEAD[2:], "agreement"], rows)
        if variant.adds_up:
            kernels, before, full = config.kernels, speed, built  # a part that failed is in no later row
    if full is not None and context.seconds_left > 10:
        most = search(context, full, model, start=largest.size, seconds=context.seconds_left * 0.5)
        section.text("largest", f"Largest micro-batch with recomputation: {largest} in plain torch, {most} with all kernels (to an eighth).")
    section.text(
        "skips",
        "Exact skips: images that only condition pass the flow without gradient, and each head reads only what it scores. Without them the flow",
        "is trained on every image, then also both heads run on every example, as where the loss is masked. Another loss, so for its time only;",
        "MFU counts what each row must compute, so that it does not fall with the skips.",
    )


def variants(context: Context, model: JetFormerConfig) -> list[Variant]:
    """Rows that make a difference on this machine, in order."""
    device = context.device
    found = [Variant("plain torch, fp32 products in fp32", {}, model)]
    if device.is_cuda:
        found.append(Variant("+ tf32", {"tf32": True}, model))
    dtypes = {"affine_coupling": torch.float32, "layer_norm": torch.float32}
    for operation in ("gmm_nll", "linear_cross_entropy", "affine_coupling", "rms_norm", "layer_norm", "rope", "geglu"):
        chosen = choose(operation, "auto", device.device, dtypes.get(operation, device.dtype))
        if chosen != "reference":
            found.append(Variant(f"+ {operation}: {chosen}", {operation: chosen}, model))
    objective = model.objective
    whole_flow = replace(model, objective=replace(objective, stop_grad_flow_on_image_prefix=False))
    both_heads = replace(model, objective=replace(objective, stop_grad_flow_on_image_prefix=False, loss_on_prefix=True))
    apart = {"same_loss": False, "adds_up": False}
    skips = [Variant("without the skip of the flow", {}, whole_flow, **apart), Variant("without any skip", {}, both_heads, **apart)]
    padded = Variant("with captions of all lengths, as of text.ignore_pad: a mask in attention", {}, model, **apart, padded=True)
    return [*found, padded, *skips, Variant("with compile: layers", {"compile": "layers"}, model, adds_up=False)]


def batches_of(context: Context, model: JetFormerConfig, micro: int, count: int, *, padded: bool = False) -> list[Batch]:
    """Micro-batches of noise and random captions on the device; captions that fill all slots, or else of all lengths."""
    return random_batches(run_config(context, model, micro_batches=count), micro, count, context.device.device, padded=padded)


def warm_up(context: Context, step: Step, model: JetFormerConfig, micro_batches: int) -> None:
    """Loads and compiles what every step needs, before a search looks at the clock: Triton makes code of its own for multiples of 16 rows."""
    for size in (2, 16):
        step.run(batches_of(context, model, size, 1) * micro_batches)


def search(context: Context, step: Step, model: JetFormerConfig, *, start: int, seconds: float) -> Largest:
    """The largest micro-batch that fits, as far as the time goes."""
    device = context.device
    until = context.seconds_left - seconds
    took: dict[int, float] = {0: 0.0}
    is_whole = True

    def may_go_on() -> bool:
        nonlocal is_whole
        is_whole = context.seconds_left > until
        return is_whole

    def fits(size: int) -> bool:
        began = time.monotonic()
        try:
            batches = batches_of(context, model, size, 1)
            count = getattr(getattr(step, "engine", None), "num_micro_batches", 2)
            step.run([batches[0]] * count)
            device.synchronise()
        except (RuntimeError, MemoryError) as error:
            if not device.is_out_of_memory(error):
                raise
            problem = True
        else:
            problem = False
            took[size] = time.monotonic() - began
        if problem:  # outside the except block, whose exception holds the tensors of the failed step
            step.recover()
            device.release()
        return not problem

    most = 4 if context.small else MOST
    size = largest_micro_batch(fits, start=start, most=most, may_go_on=may_go_on)
    return Largest(size, took[size], is_whole and size < most)


def measure(context: Context, step: Step, batches: Sequence[Batch]) -> Measured:
    """Time and peak memory of a step."""
    device = context.device
    action: Callable[[], object] = lambda: step.run(batches)  # noqa: E731
    peak = device.held_bytes() + device.peak_bytes(action)
    timing = device.compare({"": action}, seconds=context.repeat_seconds(3.0), warm_up=1, at_least=ROUNDS)[""]
    return Measured(timing, sum(len(batch) for batch in batches), peak)


def step_cells(measured: Measured, flops: float, device: Device) -> list[str]:
    """Cells of a table: times, images/s, MFU, memory."""
    timing, speed, sheet = measured.timing, measured.images / measured.timing.median, device.data_sheet_flops()
    cells = [f"{timing.median:.3f}", f"{timing.fastest:.3f}", f"{timing.spread:.0%}", f"{speed:.4g}", f"{speed * flops / device.peaks.flops:.1%}"]
    return [*cells, "-" if sheet is None else share(speed * flops, sheet), gibibytes(measured.peak_bytes)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default=NAMES, name="step", doc=__doc__))
