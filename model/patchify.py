"""Pixels to patch tokens and back, and the noise that goes on before (spec 1.2).

Letters: B images, H and W pixels, I tokens, C = patch_size**2 * channels subpixels per token.
"""

import math

import torch
from torch import Tensor, nn

from model import stats, streams
from model.batch import Batch
from model.config import ImageConfig, JetFormerConfig
from model.flow.rows import FlowRows
from model.parallel import TensorParallel
from model.state import State
from model.streams import Stream

GREY_STEP = 1 / 127.5
"""One 8-bit grey level, in the [-1, 1] units of the flow's input."""


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """[B, H, W, channels] -> [B, I, C]; tokens in raster order; row, column, channel inside a token."""
    batch, height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    grid = image.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(tokens: Tensor, config: ImageConfig) -> Tensor:
    """[B, I, C] -> [B, H, W, channels], the inverse of `patchify`."""
    batch, patch, side = len(tokens), config.patch_size, config.grid_size
    grid = tokens.reshape(batch, side, side, patch, patch, config.channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, config.resolution, config.resolution, config.channels)


def to_uint8(pixels: Tensor) -> Tensor:
    """Flow-space pixels to uint8. Dequantisation added U[0, 1) to the grey level, so its exact inverse is floor (spec 1.2)."""
    return torch.floor((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def noise_sigma(step: int, *, total_steps: int, start: float, end: float) -> float:
    """RGB noise std in grey levels before optimiser step `step`: a half cosine from start to end (paper eq. in 3.3; spec 1.2)."""
    progress = min(max(step / total_steps, 0.0), 1.0)
    return (start - end) * (1 + math.cos(math.pi * progress)) / 2 + end


def add_rgb_noise(image: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Adds noise on the 8-bit grid: round(u + sigma * noise), not clipped. All fp32; image holds grey levels."""
    return torch.round(image + sigma * noise)


class Patchify(nn.Module):
    """uint8 images -> noised, dequantised patch tokens of this tensor-parallel rank's images."""

    def __init__(self, config: JetFormerConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.config = config
        self.tp = tp

    def forward(self, state: State, batch: Batch) -> State:
        """Sets state.x to fp32 [rows, I, C]."""
        assert batch.image is not None, "the first stage needs images"
        rows = FlowRows.of(batch, self.config, self.tp)
        index = rows.local_index(batch.image.device)
        positions, image = batch.positions[index], batch.image[index].float()
        noise, shape = batch.noise, image.shape[1:]
        if noise.train and noise.sigma > 0:
            noisy = batch.text_first[index] if not self.config.objective.rgb_noise_on_image_prefix else torch.ones_like(positions, dtype=torch.bool)
            sigma = noise.sigma * noisy.float().view(-1, 1, 1, 1)
            image = add_rgb_noise(image, sigma, streams.normal(noise.seed, Stream.RGB_NOISE, positions, shape))
        if batch.dequantisation is not None:
            dequantisation = batch.dequantisation[index]
        else:
            dequantisation = streams.uniform(noise.seed, Stream.DEQUANTISATION, positions, shape)
        pixels = image * GREY_STEP - 1 + dequantisation * GREY_STEP
        state.x = patchify(pixels, self.config.image.patch_size)
        if batch.log_stats:
            stats.add(state, "logdet_per_dim", pixels.new_zeros(()), count=rows.num_scored)
        return state
