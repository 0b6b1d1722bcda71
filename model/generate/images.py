"""Draws images from captions: one soft token after the other, then the flow backwards (spec 1.10).

Letters: B images, T text slots, I image tokens, C subpixels per token, d soft channels, D width, K mixtures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from model.generate.cached import CachedDecoder
from model.generate.draws import Purpose, TokenDraws, categorical
from model.generate.guidance import Gaussian, analytic, clipped, rejection_sample
from model.generate.prefix import row_positions, text_prefix
from model.heads.gmm import GmmHead
from model.jetformer import JetFormer
from model.patchify import to_uint8, unpatchify

CfgRule = Literal["analytic", "clipped", "rejection"]
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSampling:
    """How images are drawn."""

    cfg_scale: float = 0.0
    """Guidance weight w; 0 draws from the conditional model and costs half."""
    cfg_rule: CfgRule = "analytic"
    """See model/generate/guidance.py."""
    temperature: float = 1.0
    """Multiplies the scales of the mixture, after their floor. The factored-out dims are not tempered."""
    temperature_probs: float = 1.0
    """Multiplies the mixture's logits."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale={self.cfg_scale} must not be negative: 0 is no guidance")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if self.cfg_rule not in get_args(CfgRule):
            raise ValueError(f"cfg_rule={self.cfg_rule!r} must be one of {', '.join(get_args(CfgRule))}")


@torch.no_grad()
def sample_images(
    model: JetFormer,
    text: Tensor,
    text_mask: Tensor,
    *,
    settings: ImageSampling,
    positions: Tensor | None = None,
    on_token: Callable[[int], object] | None = None,
) -> Tensor:
    """One image per row of text.

    Args:
        text: int64 [B, T], the encoded caption or label; text_mask: bool [B, T], True where attention may look.
        positions: int64 [B], which samples of the seed these are; default 0..B-1. A sample depends on (seed, position,
            text) and not on the rest of the batch.
        on_token: called with 1 after each image token, for progress bars.

    Returns:
        uint8 [B, H, W, channels].
    """
    positions = row_positions(len(text), text.device) if positions is None else positions
    soft = sample_soft_tokens(model, text, text_mask, settings=settings, positions=positions, on_token=on_token)
    return decode_images(model, soft, seed=settings.seed, positions=positions)


@torch.no_grad()
def sample_soft_tokens(
    model: JetFormer,
    text: Tensor,
    text_mask: Tensor,
    *,
    settings: ImageSampling,
    positions: Tensor,
    on_token: Callable[[int], object] | None = None,
) -> Tensor:
    """The part of the latents that the decoder models: arguments as `sample_images`, result fp32 [B, I, d].

    With guidance every example is two rows side by side, conditional and unconditional, which share what is drawn.
    """
    copies, num_tokens = 2 if settings.cfg_scale else 1, model.config.image.num_tokens
    decoder, hidden = _read_captions(model, text, text_mask, unconditional=copies == 2, extra=num_tokens - 1)
    tokens: list[Tensor] = []
    for index in range(num_tokens):
        if tokens:
            hidden = decoder.extend(model.embed.image(tokens[-1].repeat_interleave(copies, 0))[:, None])[:, -1]
        tokens.append(draw_token(model.head.gmm, hidden, settings, TokenDraws(settings.seed, positions, index)))
        if on_token is not None:
            on_token(1)
    return torch.stack(tokens, dim=1)


def _read_captions(model: JetFormer, text: Tensor, text_mask: Tensor, *, unconditional: bool, extra: int) -> tuple[CachedDecoder, Tensor]:
    """The decoder after [BOS, text, BOI], and its last hidden states [rows, D]: one row per example, or with `unconditional` two.

    An unconditional prefix is all NOLABEL and attended whole. Equal prefixes, and every unconditional one, are read once.
    """
    prefixes = torch.cat([text, text_mask.long()], dim=1)
    if unconditional:
        dropped = torch.cat([torch.full_like(text, model.config.text.nolabel_id), torch.ones_like(text)], dim=1)
        prefixes = torch.stack([prefixes, dropped], dim=1).flatten(0, 1)
    distinct, rows = torch.unique(prefixes, dim=0, return_inverse=True)
    ids, attended = distinct.chunk(2, dim=1)
    x, mask = text_prefix(model, ids, attended.bool())
    decoder = CachedDecoder(model, batch_size=len(x), length=x.shape[1])
    hidden = decoder.extend(x, None if bool(mask.all()) else mask)[:, -1]
    return decoder.take(rows, extra=extra), hidden[rows]


def draw_token(head: GmmHead, hidden: Tensor, settings: ImageSampling, draws: TokenDraws) -> Tensor:
    """One soft token per example: fp32 [B, d].

    The component is drawn first, from the conditional mixture, and only its 2d rows of the head are computed (spec 1.14).

    Args:
        hidden: [B, D], or with guidance [2B, D]: conditional and unconditional rows in turn.
    """
    copies = 2 if settings.cfg_scale else 1
    conditional_hidden = hidden[::copies]
    logits = head.mixture_logits(conditional_hidden) * settings.temperature_probs
    component = categorical(logits, draws.uniform(Purpose.COMPONENT))
    conditional = _tempered(head, conditional_hidden, component, settings.temperature)
    if copies == 1:
        return conditional.at(draws.normal(Purpose.NOISE, conditional.loc.shape[1:]))
    unconditional = _tempered(head, hidden[1::2], component, settings.temperature)
    if settings.cfg_rule == "rejection":
        return rejection_sample(conditional, unconditional, settings.cfg_scale, draws)
    guided = (clipped if settings.cfg_rule == "clipped" else analytic)(conditional, unconditional, settings.cfg_scale)
    return guided.at(draws.normal(Purpose.NOISE, guided.loc.shape[1:]))


def _tempered(head: GmmHead, hidden: Tensor, component: Tensor, temperature: float) -> Gaussian:
    loc, scale = head.component(hidden, component)
    # Guidance divides by the scales: at temperature 0 they are as good as 0, and keep their ratios.
    return Gaussian(loc, scale * max(temperature, MIN_TEMPERATURE))


@torch.no_grad()
def decode_images(model: JetFormer, soft: Tensor, *, seed: int, positions: Tensor) -> Tensor:
    """Fills the factored-out dims with N(0, 1) and runs the flow backwards: fp32 [B, I, d] -> uint8 [B, H, W, channels]."""
    image = model.config.image
    rest_shape = (image.num_tokens, image.token_dim - soft.shape[-1])
    rest = TokenDraws(seed, positions).normal(Purpose.REST, rest_shape)
    return to_uint8(unpatchify(model.decode(torch.cat([soft, rest], dim=-1)), image))
