"""What stands before the part that is generated or scored: a caption with its markers, or an image with its own (spec 1.5).

Letters: B examples, T text slots, R prefix repeats, I image tokens, C subpixels per token, d soft channels, D width.
"""

import torch
from torch import Tensor

from model import streams
from model.jetformer import JetFormer
from model.patchify import GREY_STEP, patchify
from model.streams import Stream


def text_prefix(model: JetFormer, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """BOS, text R times, BOI, as decoder inputs.

    Args:
        text: int64 [B, T]; text_mask: bool [B, T].

    Returns:
        ([B, R*T + 2, D], key mask bool [B, R*T + 2]).
    """
    bos, boi = model.embed.embed_markers(len(text), text.device)
    nothing_dropped = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    one = torch.ones(len(text), 1, dtype=torch.bool, device=text.device)
    mask = torch.cat([one, text_mask.repeat(1, model.config.text.num_repeats), one], dim=1)
    return torch.cat([bos, model.embed.embed_text(text, nothing_dropped), boi], dim=1), mask


def image_prefix(model: JetFormer, soft: Tensor, *, bos: bool) -> Tensor:
    """BOI, image and (with `bos`) BOS, as decoder inputs: soft tokens fp32 [B, I, d] -> [B, I + 1 or I + 2, D]."""
    bos_row, boi_row = model.embed.embed_markers(len(soft), soft.device)
    parts = [boi_row, model.embed.image(soft)]
    return torch.cat([*parts, bos_row] if bos else parts, dim=1)


def encode_images(model: JetFormer, images: Tensor, *, seed: int = 0, positions: Tensor | None = None) -> Tensor:
    """Latents of images without RGB noise (spec 1.2): uint8 [B, H, W, channels] -> fp32 [B, I, C].

    Args:
        seed, positions: key of the dequantisation noise; `positions` int64 [B] defaults to 0..B-1, so that one image
            gets the same noise in every call only if it stands at the same place.

    Raises:
        ValueError: the images are not of the model's shape or type.
    """
    image = model.config.image
    expected = (image.resolution, image.resolution, image.channels)
    if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(f"images must be uint8 [B, {', '.join(map(str, expected))}], not {images.dtype} {list(images.shape)}")
    positions = row_positions(len(images), images.device) if positions is None else positions
    noise = streams.uniform(seed, Stream.DEQUANTISATION, positions, expected)
    return model.encode(patchify(images.float() * GREY_STEP - 1 + noise * GREY_STEP, image.patch_size))[0]


def soft_tokens(model: JetFormer, latents: Tensor) -> Tensor:
    """The channels that the decoder models: [B, I, C] -> [B, I, d]."""
    return latents[..., : model.config.gmm.soft_dim]


def row_positions(num: int, device: torch.device) -> Tensor:
    """0..num-1: sample positions of a set that is drawn or read whole."""
    return torch.arange(num, device=device)
