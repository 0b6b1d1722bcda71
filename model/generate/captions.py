"""Writes captions for images: [BOI, image, BOS], then one text piece after the other (spec 1.10).

Letters: B images, T text slots, I image tokens, d soft channels.
"""

import torch
from torch import Tensor

from configs.errors import UserError
from model.generate.cached import CachedDecoder
from model.generate.draws import Purpose, TokenDraws, categorical
from model.generate.prefix import encode_images, image_prefix, row_positions, soft_tokens
from model.heads.text import TextHead
from model.jetformer import JetFormer


@torch.no_grad()
def write_captions(model: JetFormer, images: Tensor, *, temperature: float = 0.0, seed: int = 0, positions: Tensor | None = None) -> Tensor:
    """Text pieces for each image, all slots after the EOS filled with pads.

    Args:
        images: uint8 [B, H, W, channels].
        temperature: divides the logits; 0 takes the likeliest piece (the reference's default of 1e-5, in the limit).
        positions: int64 [B], key of the random draws with `seed`; default 0..B-1.

    Returns:
        int64 [B, T].

    Raises:
        UserError: the model has no text head.
    """
    head, config = text_head(model), model.config.text
    positions = row_positions(len(images), images.device) if positions is None else positions
    soft = soft_tokens(model, encode_images(model, images, seed=seed, positions=positions))
    x = image_prefix(model, soft, bos=True)
    decoder = CachedDecoder(model, batch_size=len(x), length=x.shape[1] + config.length - 1)
    hidden = decoder.extend(x)[:, -1]
    pieces = torch.full((len(images), config.length), config.pad_id, device=images.device)
    done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    keep = torch.zeros_like(done)  # nothing is replaced by NOLABEL
    for slot in range(config.length):
        if slot:
            hidden = decoder.extend(model.embed.embed_text(pieces[:, slot - 1 : slot], keep))[:, -1]
        piece = _draw(head.logits(hidden), temperature, TokenDraws(seed, positions, slot))
        pieces[:, slot] = torch.where(done, config.pad_id, piece)
        done |= piece == config.eos_id
        if bool(done.all()):
            break
    return pieces


def text_head(model: JetFormer) -> TextHead:
    """The model's text head.

    Raises:
        UserError: it has none, as a class-conditional one.
    """
    if model.head.text is None or model.config.text.num_repeats != 1:
        raise UserError(
            "this model writes and scores no text",
            got=f"text.tie_logits={model.config.text.tie_logits}, text.num_repeats={model.config.text.num_repeats}: a class-conditional model",
            expected="a model trained on captions",
        )
    return model.head.text


def _draw(logits: Tensor, temperature: float, draws: TokenDraws) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return categorical(logits / temperature, draws.uniform(Purpose.PIECE))
