"""Random numbers as a function of (seed, stream, sample position): no generator state anywhere.

Every draw belongs to one sample of the training order, so it is the same whatever the micro-batch it sits in, the layout of the
run, or the number of restarts before it. Bits and uniforms are the same on every device too; normals go through log and cos, whose
last digit is the device's own. The generator is SplitMix64 (Steele, Lea, Flood 2014: "Fast
splittable pseudorandom number generators"), run in counter mode on int64 tensors, whose multiplication wraps as needed.
"""

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels.splitmix import GOLDEN, DropoutKey, mix, mix_int, random_words, shift_right, signed
from model.kernels.splitmix import keep_mask as keep_mask_of_key


class Stream(enum.IntEnum):
    """One independent stream per use (spec 3.10)."""

    ORDER = 1
    """Caption first or image first."""
    LABEL_DROP = 2
    """Prefix dropped for classifier-free guidance."""
    RGB_NOISE = 3
    DEQUANTISATION = 4
    INPUT_NOISE = 5
    """Noise on soft tokens."""
    INPUT_NOISE_STD = 6
    DROPOUT = 7
    FLIP = 8
    SAMPLING = 9


def random_bits(seed: int, stream: int, positions: Tensor, num_words: int, *, substream: int | Tensor = 0) -> Tensor:
    """64 random bits per word.

    Args:
        positions: int64 [B], global sample positions.
        num_words: words per sample.
        substream: distinguishes several draws of one stream, such as the layers of dropout. int64 [B]: each row has its own.

    Returns:
        int64 [B, num_words].
    """
    return random_words(_keys(seed, stream, positions, substream), num_words)


def uniform(seed: int, stream: int, positions: Tensor, shape: Sequence[int], *, substream: int | Tensor = 0) -> Tensor:
    """Uniform fp32 in [0, 1), shape [B, *shape], with 24 random bits each."""
    count = math.prod(shape)
    halves = random_bits(seed, stream, positions, (count + 1) // 2, substream=substream).view(torch.int32)
    values = ((halves >> 8) & 0xFFFFFF).float() * 2.0**-24
    return values[:, :count].reshape(len(positions), *shape)


def normal(seed: int, stream: int, positions: Tensor, shape: Sequence[int], *, substream: int | Tensor = 0) -> Tensor:
    """Standard normal fp32, shape [B, *shape], by Box-Muller on 32-bit uniforms (tails to 6.6 sigma)."""
    count = math.prod(shape)
    words = random_bits(seed, stream, positions, (count + 1) // 2, substream=substream)
    radius_uniform = (shift_right(words, 32).float() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(radius_uniform))
    angle = (words & 0xFFFFFFFF).float() * (2.0 * math.pi * 2.0**-32)
    values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return values[:, :count].reshape(len(positions), *shape)


def keep_mask(seed: int, stream: int, positions: Tensor, shape: Sequence[int], *, drop_probability: float, substream: int = 0) -> Tensor:
    """Bool [B, *shape], True with probability 1 - drop_probability rounded to 2**-16: four draws per word."""
    return keep_mask_of_key(DropoutKey(_keys(seed, stream, positions, substream), drop_probability), shape)


def substream_keys(seed: int, stream: int, positions: Tensor, num_substreams: int) -> Tensor:
    """int64 [num_substreams, B]: with row k as its keys, a `DropoutKey` draws the mask that `keep_mask` draws in substream k."""
    return _keys(seed, stream, positions, torch.arange(num_substreams, device=positions.device)[:, None])


def _keys(seed: int, stream: int, positions: Tensor, substream: int | Tensor) -> Tensor:
    """One key per sample, int64 [B], or for a tensor of substreams the shape that it and the positions broadcast to."""
    stream_key = mix_int(mix_int(seed) ^ (stream * GOLDEN))
    if isinstance(substream, int):
        return mix(positions * signed(GOLDEN) ^ signed(mix_int(stream_key ^ (substream * GOLDEN))))
    return mix(positions * signed(GOLDEN) ^ mix((substream * signed(GOLDEN) ^ signed(stream_key)) + signed(GOLDEN)))
