"""Features of images for probes: what the flow and every block make of [BOI, image], averaged over positions (spec 1.10).

Letters: B images, I image tokens, C subpixels per token, D width.
"""

import torch
from torch import Tensor

from model.decoder.attention import AttentionContext
from model.generate.prefix import encode_images, image_prefix, soft_tokens
from model.jetformer import JetFormer
from model.sequence import rope_positions


@torch.no_grad()
def image_representation(model: JetFormer, images: Tensor, *, seed: int = 0, positions: Tensor | None = None) -> dict[str, Tensor]:
    """Mean-pooled outputs of all layers.

    Args:
        images: uint8 [B, H, W, channels].
        seed, positions: key of the dequantisation noise, as in `encode_images`.

    Returns:
        fp32: `flow` [B, C]; `blocks.0`, `blocks.1`, ... and `norm` (the final norm) [B, D].
    """
    latents = encode_images(model, images, seed=seed, positions=positions)
    features = {"flow": latents.mean(1)}
    x = image_prefix(model, soft_tokens(model, latents), bos=False)
    context = AttentionContext.build(rope_positions(None, x.shape[1], x.device), None, model.config.decoder)
    for index in range(len(model.blocks)):
        x = model.block(index).decode(x, context, None)
        features[f"blocks.{index}"] = x.float().mean(1)
    features["norm"] = model.head.norm(x).float().mean(1)
    return features
