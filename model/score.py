"""How likely captions are, given images: classification and ranking without drawing anything (spec 1.10).

Letters: B images, N candidates, T text slots.
"""

import torch
from torch import Tensor

from model.generate.cached import CachedDecoder
from model.generate.captions import text_head
from model.generate.prefix import encode_images, image_prefix, soft_tokens
from model.jetformer import JetFormer


@torch.no_grad()
def score_captions(
    model: JetFormer,
    images: Tensor,
    text: Tensor,
    text_mask: Tensor,
    text_loss: Tensor,
    *,
    seed: int = 0,
    positions: Tensor | None = None,
    max_rows: int = 256,
) -> Tensor:
    """log p(candidate | image), summed over the scored slots: `.argmax(1)` classifies.

    The image is read once; a candidate costs T - 1 positions in place of I + T + 1.

    Args:
        images: uint8 [B, H, W, channels].
        text: int64 [N, T], the candidates, with text_mask and text_loss bool [N, T] as the codec gives them.
        seed, positions: key of the dequantisation noise, as in `encode_images`.
        max_rows: image-candidate pairs at a time.

    Returns:
        fp32 nats [B, N].

    Raises:
        UserError: the model has no text head.
    """
    head = text_head(model)
    soft = soft_tokens(model, encode_images(model, images, seed=seed, positions=positions))
    x = image_prefix(model, soft, bos=True)
    prefix = CachedDecoder(model, batch_size=len(x), length=x.shape[1])
    first = prefix.extend(x)[:, -1:]
    per_pass = max(1, max_rows // max(1, len(images)))
    scores = []
    for start in range(0, len(text), per_pass):
        some = slice(start, start + per_pass)
        hidden = _read_candidates(prefix, first, text[some], text_mask[some])
        nll = head.nll(hidden, text[some].repeat(len(images), 1))
        scored = nll * text_loss[some].repeat(len(images), 1)
        scores.append(-scored.sum(-1).view(len(images), -1))
    return torch.cat(scores, dim=1)


def _read_candidates(prefix: CachedDecoder, first: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """Hidden states from which every slot is predicted, [B * n, T, D]: the image's last one, then those of all pieces but the last."""
    num_images, num = len(first), len(text)
    first = first.repeat_interleave(num, dim=0)
    if text.shape[1] == 1:
        return first
    rows, mask = text[:, :-1].repeat(num_images, 1), text_mask[:, :-1].repeat(num_images, 1)
    x = prefix.model.embed.embed_text(rows, torch.zeros(len(rows), dtype=torch.bool, device=rows.device))
    copies = torch.arange(num_images, device=rows.device).repeat_interleave(num)
    decoder = prefix.take(copies, extra=x.shape[1])
    return torch.cat([first, decoder.extend(x, None if bool(mask.all()) else mask)], dim=1)
