"""Draws images from captions: one soft token after the other, then the flow backwards (spec 1.10).

Letters: B images, T text slots, I image tokens, C subpixels per token, d soft channels, D width, K mixtures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from configs.errors import UserError
from model.generate.cached import CachedDecoder
from model.generate.draws import Purpose, TokenDraws, all_tokens, categorical
from model.generate.guidance import rejection_sample
from model.generate.prefix import row_positions, text_prefix
from model.generate.static import StaticDecoder, replay_steps, run_steps
from model.heads.gmm import GmmHead
from model.jetformer import JetFormer
from model.kernels.mixture_sample.interface import ClosedForm, component_gaussian, mixture_sample
from model.patchify import to_uint8, unpatchify

CfgRule = Literal["analytic", "clipped", "rejection"]
Loop = Literal["auto", "eager", "graph"]
"""How the steps of sampling are launched: each operation from the host, or on CUDA a graph of all of them. `auto` takes the graph where
there can be one. The images are the same up to rounding."""


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

    @property
    def closed_form(self) -> ClosedForm | None:
        """The rule by which a token is drawn at once; None for rejection, which draws until all dims have been accepted."""
        if self.cfg_rule == "rejection":
            return None if self.cfg_scale else "analytic"  # without guidance the rules agree
        return self.cfg_rule

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
    loop: Loop = "auto",
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

    Raises:
        UserError: `loop` is `graph` where there can be none.
    """
    positions = row_positions(len(text), text.device) if positions is None else positions
    soft = sample_soft_tokens(model, text, text_mask, settings=settings, positions=positions, loop=loop, on_token=on_token)
    return decode_images(model, soft, seed=settings.seed, positions=positions)


@torch.no_grad()
def sample_soft_tokens(
    model: JetFormer,
    text: Tensor,
    text_mask: Tensor,
    *,
    settings: ImageSampling,
    positions: Tensor,
    loop: Loop = "auto",
    on_token: Callable[[int], object] | None = None,
) -> Tensor:
    """The part of the latents that the decoder models: arguments as `sample_images`, result fp32 [B, I, d].

    With guidance every example is two rows side by side, conditional and unconditional, which share what is drawn.
    """
    has_graph = _has_graph(loop, settings, text.device)
    num_steps = model.config.image.num_tokens - 1
    decoder, hidden = _read_captions(model, text, text_mask, unconditional=bool(settings.cfg_scale), steps=num_steps)
    sampler = _TokenSampler(decoder, settings, positions)

    def report() -> None:
        if on_token is not None:
            on_token(1)

    sampler.draw(hidden)
    report()
    if has_graph:
        replay_steps(sampler.step, num_steps, on_step=report, device=text.device, required=loop == "graph")
    else:
        run_steps(sampler.step, num_steps, on_step=report)
    return sampler.tokens


def _has_graph(loop: Loop, settings: ImageSampling, device: torch.device) -> bool:
    """Whether the steps are replayed from a CUDA graph."""
    obstacle = ""
    if device.type != "cuda":
        obstacle = f"CUDA graphs need a CUDA device, not {device.type}"
    elif settings.closed_form is None:
        obstacle = "cfg_rule=rejection draws as often as the numbers ask for, and a graph runs the same operations each time"
    if obstacle and loop == "graph":
        raise UserError("loop=graph cannot run here", got=obstacle, fix="use loop=auto")
    return loop != "eager" and not obstacle


class _TokenSampler:
    """Draws token after token into one buffer. A step reads and writes the same tensors each time, and no number of the host changes."""

    def __init__(self, decoder: StaticDecoder, settings: ImageSampling, positions: Tensor) -> None:
        self._decoder, self._settings, self._positions = decoder, settings, positions
        config = decoder.model.config
        num_tokens, size, soft_dim = config.image.num_tokens, len(positions), config.gmm.soft_dim
        self.tokens = torch.zeros(size, num_tokens, soft_dim, device=positions.device)
        """fp32 [B, I, d], drawn so far."""
        if settings.closed_form is not None:
            # Drawn ahead: a token's own bits take some thirty small operations.
            draws = all_tokens(settings.seed, positions, num_tokens)
            self._uniform = draws.uniform(Purpose.COMPONENT).view(num_tokens, size)
            self._noise = draws.normal(Purpose.NOISE, (soft_dim,)).view(num_tokens, size, soft_dim)

    def step(self) -> None:
        """Feeds the last token and draws the next."""
        model, copies = self._decoder.model, 2 if self._settings.cfg_scale else 1
        x = model.embed.image(self.tokens.index_select(1, self._decoder.index))
        x = x[:, None].expand(-1, copies, -1, -1).flatten(0, 1)  # [copies * B, 1, D]
        self.draw(self._decoder.step(x)[:, -1])

    def draw(self, hidden: Tensor) -> None:
        """Draws a token after hidden states [B, D], or with guidance [2B, D]."""
        head, index = self._decoder.model.head.gmm, self._decoder.index
        if self._settings.closed_form is None:
            draws = TokenDraws(self._settings.seed, self._positions, index.expand(len(self._positions)))
            token = draw_token(head, hidden, self._settings, draws)
        else:
            uniform, noise = (x.index_select(0, index)[0] for x in (self._uniform, self._noise))
            token = _draw_at_once(head, hidden, self._settings, uniform, noise)
        self.tokens.index_copy_(1, index, token[:, None].to(self.tokens.dtype))


def _read_captions(model: JetFormer, text: Tensor, text_mask: Tensor, *, unconditional: bool, steps: int) -> tuple[StaticDecoder, Tensor]:
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
    past = CachedDecoder(model, batch_size=len(x), length=x.shape[1])
    hidden = past.extend(x, None if bool(mask.all()) else mask)[:, -1]
    return StaticDecoder(past, rows, steps=steps), hidden[rows]


def draw_token(head: GmmHead, hidden: Tensor, settings: ImageSampling, draws: TokenDraws) -> Tensor:
    """One soft token per example: fp32 [B, d].

    The component is drawn first, from the conditional mixture, and only its 2d rows of the head are computed (spec 1.14).

    Args:
        hidden: [B, D], or with guidance [2B, D]: conditional and unconditional rows in turn.
    """
    uniform = draws.uniform(Purpose.COMPONENT)
    if settings.closed_form is not None:
        noise = draws.normal(Purpose.NOISE, head.component_bias.shape[2:])
        return _draw_at_once(head, hidden, settings, uniform, noise)
    component = _draw_component(head, hidden, settings, uniform)
    conditional, unconditional = component_gaussian(
        hidden, head.component_weight, head.component_bias, component, temperature=settings.temperature, impl=head.kernels.mixture_sample
    )
    return rejection_sample(conditional, unconditional, settings.cfg_scale, draws)


def _draw_at_once(head: GmmHead, hidden: Tensor, settings: ImageSampling, uniform: Tensor, noise: Tensor) -> Tensor:
    """A token from its random numbers: uniform [B] for the component, normal [B, d] within its Gaussian."""
    assert settings.closed_form is not None
    return mixture_sample(
        hidden,
        head.component_weight,
        head.component_bias,
        _draw_component(head, hidden, settings, uniform),
        noise,
        cfg_scale=settings.cfg_scale,
        cfg_rule=settings.closed_form,
        temperature=settings.temperature,
        impl=head.kernels.mixture_sample,
    )


def _draw_component(head: GmmHead, hidden: Tensor, settings: ImageSampling, uniform: Tensor) -> Tensor:
    """int64 [B], from the mixtures of the conditional rows."""
    logits = head.mixture_logits(hidden[:: 2 if settings.cfg_scale else 1])
    return categorical(logits * settings.temperature_probs, uniform)


@torch.no_grad()
def decode_images(model: JetFormer, soft: Tensor, *, seed: int, positions: Tensor) -> Tensor:
    """Fills the factored-out dims with N(0, 1) and runs the flow backwards: fp32 [B, I, d] -> uint8 [B, H, W, channels]."""
    image = model.config.image
    rest_shape = (image.num_tokens, image.token_dim - soft.shape[-1])
    rest = TokenDraws(seed, positions).normal(Purpose.REST, rest_shape)
    return to_uint8(unpatchify(model.decode(torch.cat([soft, rest], dim=-1)), image))
