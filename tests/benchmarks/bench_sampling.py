"""Sampling with guidance: images/s of whole images, captions to pixels, by batch size and by how the steps are launched.

python -m tests.benchmarks.bench_sampling [--small]
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model.config import JetFormerConfig
from model.generate.images import ImageSampling, decode_images, sample_images, sample_soft_tokens
from model.generate.prefix import row_positions
from model.jetformer import JetFormer
from model.kernels.config import KernelsConfig
from tests.benchmarks.bench_device import Device, gibibytes
from tests.benchmarks.bench_runner import main
from tests.benchmarks.bench_section import Context, Section
from tests.benchmarks.bench_step_loop import REFERENCE, fill, miniature, published

SETTINGS = ImageSampling(cfg_scale=6.0, cfg_rule="clipped", temperature=0.96)
EARLY_TOKENS = 8
"""Compared between two loops over the same kernels; later ones differ for good after one draw that rounding decided otherwise."""
SAME = 0.2
"""Relative difference of an image's early tokens below which they count as the same: in bf16 guidance makes 1.5 % of the hidden states up to 5 % of a
token, and a token of another component is apart by more than the whole."""
LEAST_ALIKE = 0.25
"""Share of the images that must begin alike. Other kernels round otherwise: after 24 layers in bf16 hidden states are apart by 1.5 %, by which
one draw in four falls on another of the 1,024 components. So between them the first token alone is compared."""
HEAD = [
    "model",
    "batch",
    "how",
    "median s",
    "fastest s",
    "spread",
    "images/s",
    "ms a token",
    "inverse flow s",
    "peak memory",
    "begin alike",
]


def sampling(context: Context, section: Section) -> None:
    """350m in each way, 1p3b in the best."""
    device = context.device
    batches = (1, 4) if context.small else (1, 16, 256)
    section.text("what", f"Guidance {SETTINGS.cfg_scale:g} (two rows per image), rule `{SETTINGS.cfg_rule}`, distinct captions, {device.dtype}.")
    rows: list[list[str]] = []
    for size in ("350m", "1p3b"):
        config = miniature() if context.small else published(size)
        model = build(config, device)
        ways: dict[str, tuple[JetFormer, str]] = {"graph": (model, "graph")} if device.is_cuda else {}
        if size == "350m":
            plain = build(config, device, like=model)
            ways = {"plain torch, eager": (plain, "eager"), "kernels, eager": (model, "eager"), **ways}
        elif not ways:
            ways = {"kernels, eager": (model, "eager")}
        for batch in batches:
            if rows and context.seconds_left < 15:
                section.item("left out", f"{size}, batch {batch}: time ran out")
                continue
            # Plain torch is slow in the same way at every batch: one is enough.
            chosen = {name: way for name, way in ways.items() if batch == batches[1] or "plain" not in name}
            rows += measure(context, size, config, batch, chosen)
            section.table("table", HEAD, rows)
        device.release()
    section.text(
        "note",
        f"`begin alike`: share of the images whose first token is that of the first row at this batch, to {SAME:.0%};",
        f"first {EARLY_TOKENS} tokens where an earlier row has the same kernels. Draws that rounding decides fall either way.",
    )


def build(config: JetFormerConfig, device: Device, *, like: JetFormer | None = None) -> JetFormer:
    """A model in the dtype of the device; with `like`, its weights in plain torch."""
    model = JetFormer(config, kernels=REFERENCE if like is not None else KernelsConfig())
    if like is not None:
        model.load_state_dict(like.state_dict(keep_vars=True), assign=True)
        return model.to(device.device).eval()
    model.to(device.device)
    fill(model.named_parameters())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device.dtype)
    return model.eval().requires_grad_(False)


def measure(context: Context, size: str, config: JetFormerConfig, batch: int, ways: dict[str, tuple[JetFormer, str]]) -> list[list[str]]:
    """Rows of one model at one batch size, all ways turn by turn."""
    device = context.device
    text = torch.randint(0, config.text.num_pieces, (batch, config.text.length), generator=torch.Generator().manual_seed(0)).to(device.device)
    mask, positions = torch.ones_like(text, dtype=torch.bool), row_positions(batch, device.device)
    earlier: list[tuple[JetFormer, Tensor]] = []
    same, peaks = {}, {}
    held = device.held_bytes()
    for name, (model, loop) in ways.items():
        drawn: list[Tensor] = []

        def action(model: JetFormer = model, loop: str = loop, drawn: list[Tensor] = drawn) -> None:
            drawn.append(sample_soft_tokens(model, text, mask, settings=SETTINGS, positions=positions, loop=loop))  # type: ignore[arg-type]
            decode_images(model, drawn[0], seed=0, positions=positions)

        peaks[name] = held + device.peak_bytes(action)
        (soft,) = drawn
        assert bool(soft.isfinite().all()), f"{name} at batch {batch}: not finite"
        same[name] = share_alike(model, soft, earlier)
        assert batch == 1 or same[name] >= LEAST_ALIKE, f"{name} at batch {batch}: only {same[name]:.0%} of the images begin alike; not timed"
        earlier.append((model, soft))
    draw = partial(sample_images, text=text, text_mask=mask, settings=SETTINGS, positions=positions)
    actions: dict[str, Callable[[], object]] = {name: partial(draw, model, loop=loop) for name, (model, loop) in ways.items()}
    model, soft = earlier[0]
    actions["inverse flow"] = lambda: decode_images(model, soft, seed=0, positions=positions)
    found = device.compare(actions, seconds=context.repeat_seconds(2.0), warm_up=0, at_least=3)
    rows = []
    for name in ways:
        timing, flow = found[name], found["inverse flow"].median
        tokens = 1e3 * (timing.median - flow) / config.image.num_tokens
        times = [f"{timing.median:.3f}", f"{timing.fastest:.3f}", f"{timing.spread:.0%}", f"{batch / timing.median:.3g}"]
        rows.append([size, f"{batch}", name, *times, f"{tokens:.2f}", f"{flow:.3f}", gibibytes(peaks[name]), f"{same[name]:.0%}"])
    return rows


def share_alike(model: JetFormer, soft: Tensor, earlier: list[tuple[JetFormer, Tensor]]) -> float:
    """Share of images fp32 [B, I, d] that begin as those of an earlier way: of the same model if there is one, else the first token of the first."""
    own = [other for kin, other in earlier if kin is model]
    other, tokens = (own[0], EARLY_TOKENS) if own else (earlier[0][1], 1) if earlier else (soft, EARLY_TOKENS)
    a, b = soft[:, :tokens].flatten(1), other[:, :tokens].flatten(1)
    return float(((a - b).norm(dim=1) <= SAME * b.norm(dim=1)).float().mean())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default=("sampling",), name="sampling", doc=__doc__))
