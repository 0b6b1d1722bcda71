"""One micro-batch as it enters the model: a caption, an image and an order for each example.

Letters: B examples, T text slots, H and W pixels.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import streams
from model.config import JetFormerConfig, ObjectiveConfig
from model.streams import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSettings:
    """What the random streams need beside the sample position."""

    seed: int
    sigma: float = 0.0
    """Std of the RGB noise in grey levels; 0 draws none (spec 1.2)."""
    train: bool = False
    """Training draws RGB noise, input noise, label drop and dropout; evaluation only dequantises."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """Examples sorted with the text-first ones in front, so that each head reads one slice instead of a mask."""

    positions: Tensor
    """int64 [B], global sample positions: the key of every random draw."""
    text: Tensor
    """int64 [B, T]."""
    text_mask: Tensor
    """bool [B, T], True where attention may look."""
    text_loss: Tensor
    """bool [B, T], True where the text is scored."""
    text_first: Tensor
    """bool [B], non-increasing."""
    drop_prefix: Tensor
    """bool [B], True where the caption is replaced by NOLABEL."""
    image: Tensor | None
    """uint8 [B, H, W, channels]; None where the flow is computed elsewhere."""
    num_text_first: int
    padded: bool
    """Whether any text slot is masked out of attention; known here to spare a device synchronisation."""
    noise: NoiseSettings
    score_all: bool = False
    """Both heads on every row and the log-determinant of every image: evaluation and parity."""
    log_stats: bool = True
    """Compute the metrics that cost more than the loss itself."""
    valid_text_fraction: float = 1.0
    """Share of the global batch whose caption was not dropped (used when the prefix is scored)."""
    dequantisation: Tensor | None = None
    """fp32 in [0, 1) [B, H, W, channels] to use in place of the stream."""
    input_noise: Tensor | None = None
    """fp32 [B, I, d], already scaled, to use in place of the stream."""

    def __len__(self) -> int:
        return len(self.positions)

    def scores_prefix(self, objective: ObjectiveConfig) -> bool:
        """Whether the modality that comes first in an example is scored as well."""
        return self.score_all or objective.loss_on_prefix

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`; the host does not wait for copies from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked host memory, from which a GPU copies by itself. Needs CUDA."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)


def draw_text_first(objective: ObjectiveConfig, seed: int, positions: Tensor) -> Tensor:
    """Order of each example: bool [B], True where the caption comes before the image (spec 1.5)."""
    probability = objective.text_first_probability
    if objective.order == "alternate":
        # A Bresenham line: any run of n consecutive positions holds n * probability text-first ones, to within one.
        steps = positions.double() * probability
        return torch.floor(steps + probability) > torch.floor(steps)
    return streams.uniform(seed, Stream.ORDER, positions, ()) < probability


def draw_drop_prefix(objective: ObjectiveConfig, seed: int, positions: Tensor, text_first: Tensor) -> Tensor:
    """Prefixes dropped for classifier-free guidance: bool [B]; the image prefix is never dropped (spec 1.5)."""
    dropped = streams.uniform(seed, Stream.LABEL_DROP, positions, ()) <= objective.label_drop_probability
    return dropped & text_first


def make_batch(
    config: JetFormerConfig,
    *,
    positions: Tensor,
    text: Tensor,
    text_mask: Tensor,
    text_loss: Tensor,
    image: Tensor | None,
    noise: NoiseSettings,
    text_first: Tensor | None = None,
    drop_prefix: Tensor | None = None,
    **options: object,
) -> Batch:
    """Draws order and label drop from the streams (unless given), and sorts text-first examples to the front.

    Args:
        positions: int64 [B]; text: int64 [B, T]; text_mask and text_loss: bool [B, T]; image: uint8 [B, H, W, channels].
        text_first, drop_prefix: bool [B], to use in place of the streams.
        options: any further field of `Batch`; its tensors are sorted too.
    """
    if text_first is None:
        text_first = draw_text_first(config.objective, noise.seed, positions)
    if drop_prefix is None:
        drop_prefix = draw_drop_prefix(config.objective, noise.seed, positions, text_first) if noise.train else torch.zeros_like(text_first)
    order = torch.argsort((~text_first).long(), stable=True)

    def pick(values: object) -> object:
        return values[order] if isinstance(values, Tensor) else values

    return Batch(
        positions=positions[order],
        text=text[order],
        text_mask=text_mask[order],
        text_loss=text_loss[order],
        text_first=text_first[order],
        drop_prefix=drop_prefix[order],
        image=None if image is None else image[order],
        num_text_first=int(text_first.sum()),
        padded=not bool(text_mask.all()),
        noise=noise,
        **{name: pick(value) for name, value in options.items()},  # type: ignore[arg-type]
    )
