"""Every parameter's start and whether it decays, in one table (spec 1.3, 1.6, 1.7, 1.9).

A tensor's values are a function of (seed, global name): drawn whole, then sliced, so every layout starts alike.

    parameter                          init                                              decays
    couplings.*.dnn.init_proj          lecun normal, bias 0                              weight
    couplings.*.dnn.posemb             N(0, 1/sqrt(width))                               no
    ...attention.qkv, attention.out    xavier uniform on [width, width], bias 0          weight
    ...fc1, fc2                        xavier uniform, bias N(0, 1e-6)                   weight
    ...norm*                           1 and 0                                           no
    couplings.*.dnn.final_proj         0 (the flow starts as the identity)               weight
    embed.text                         N(0, 1)                                           no
    embed.image                        lecun normal, bias 0                              weight
    blocks.*.attn.*, blocks.*.mlp.*    lecun normal                                      weight
    *.norm*.scale                      0 (the gain is 1 + scale)                         no
    head.gmm.*_weight                  0                                                 weight
    head.gmm.component_bias            means N(0, gmm.init_symmetry_std), scales 0       no
    head.gmm.logit_bias                0                                                 no
    head.text                          N(0, text.logits_init_std), bias 0                weight
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model.config import JetFormerConfig
from model.parallel import global_shape, shard_of

Draw = Callable[[tuple[int, ...], torch.Generator, JetFormerConfig], Tensor]
_TRUNCATED_STD = 0.87962566103423978
"""Std of a standard normal cut at +-2: jax's truncated-normal initialisers divide by it."""


def _zeros(shape: tuple[int, ...], generator: torch.Generator, config: JetFormerConfig) -> Tensor:
    return torch.zeros(shape)


def _ones(shape: tuple[int, ...], generator: torch.Generator, config: JetFormerConfig) -> Tensor:
    return torch.ones(shape)


def _lecun(shape: tuple[int, ...], generator: torch.Generator, config: JetFormerConfig) -> Tensor:
    std = math.sqrt(1 / shape[1]) / _TRUNCATED_STD
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator)


def _xavier(shape: tuple[int, ...], generator: torch.Generator, config: JetFormerConfig) -> Tensor:
    return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)


def _xavier_thirds(shape: tuple[int, ...], generator: torch.Generator, config: JetFormerConfig) -> Tensor:
    """q, k and v stacked on dimension 0, each drawn on its own square shape."""
    return torch.cat([_xavier((shape[0] // 3, shape[1]), generator, config) for _ in range(3)])


def _normal(std: float | Callable[[JetFormerConfig], float]) -> Draw:
    def draw(shape: tuple[int, ...], generator: torch.Generator, config: JetFormerConfig) -> Tensor:
        return torch.randn(shape, generator=generator) * (std(config) if callable(std) else std)

    return draw


def _component_bias(shape: tuple[int, ...], generator: torch.Generator, config: JetFormerConfig) -> Tensor:
    bias = torch.zeros(shape)
    bias[:, 0] = torch.randn(shape[0], shape[2], generator=generator) * config.gmm.init_symmetry_std
    return bias


TABLE: tuple[tuple[str, Draw, bool], ...] = (
    (r"couplings\.\d+\.dnn\.init_proj\.weight", _lecun, True),
    (r"couplings\.\d+\.dnn\.posemb", _normal(lambda config: config.flow.width**-0.5), False),
    (r"couplings\.\d+\.dnn\.blocks\.\d+\.attention\.qkv\.weight", _xavier_thirds, True),
    (r"couplings\.\d+\.dnn\.blocks\.\d+\.attention\.out\.weight", _xavier, True),
    (r"couplings\.\d+\.dnn\.blocks\.\d+\.fc[12]\.weight", _xavier, True),
    (r"couplings\.\d+\.dnn\.blocks\.\d+\.fc[12]\.bias", _normal(1e-6), False),
    (r"couplings\.\d+\.dnn\.(blocks\.\d+\.)?norm[12]?\.weight", _ones, False),
    (r"couplings\.\d+\.dnn\.final_proj\.weight", _zeros, True),
    (r"embed\.text\.weight", _normal(1.0), False),
    (r"embed\.image\.weight", _lecun, True),
    (r"blocks\.\d+\.(attn|mlp)\..*\.?weight", _lecun, True),
    (r".*norm\d?\.scale", _zeros, False),
    (r"head\.gmm\.(logit|component)_weight", _zeros, True),
    (r"head\.gmm\.component_bias", _component_bias, False),
    (r"head\.gmm\.logit_bias", _zeros, False),
    (r"head\.text\.weight", _normal(lambda config: config.text.logits_init_std), True),
    (r".*\.bias", _zeros, False),
)


def _rule(name: str) -> tuple[Draw, bool]:
    for pattern, draw, decays in TABLE:
        if re.fullmatch(pattern, name):
            return draw, decays
    raise KeyError(f"no initialisation rule for parameter {name!r}: add one to model/init.py")


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter of this global name (spec 1.9's mask)."""
    return _rule(name)[1]


@torch.no_grad()
def initialise(named_parameters: Iterable[tuple[str, nn.Parameter]], config: JetFormerConfig, seed: int) -> None:
    """Fills parameters in place from their global names.

    Args:
        named_parameters: (global name, parameter or this rank's slice of it).
    """
    for name, parameter in named_parameters:
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big"))
        whole = _rule(name)[0](global_shape(parameter), generator, config)
        shard = shard_of(parameter)
        parameter.copy_(whole if shard is None else whole.narrow(shard.dim, shard.start, shard.size))
