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

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


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
    keys = _mix(positions * _signed(_GOLDEN) ^ _key(seed, stream, substream))
    counters = torch.arange(1, num_words + 1, device=positions.device, dtype=torch.int64) * _signed(_GOLDEN)
    return _mix(keys[:, None] + counters)


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
    radius_uniform = (_shift_right(words, 32).float() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(radius_uniform))
    angle = (words & 0xFFFFFFFF).float() * (2.0 * math.pi * 2.0**-32)
    values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return values[:, :count].reshape(len(positions), *shape)


def keep_mask(seed: int, stream: int, positions: Tensor, shape: Sequence[int], *, drop_probability: float, substream: int = 0) -> Tensor:
    """Bool [B, *shape], True with probability 1 - drop_probability rounded to 2**-16: four draws per word."""
    count = math.prod(shape)
    lanes = random_bits(seed, stream, positions, (count + 3) // 4, substream=substream).view(torch.int16)
    threshold = round(drop_probability * 2**16) - 2**15
    return (lanes[:, :count] >= threshold).reshape(len(positions), *shape)


def _key(seed: int, stream: int, substream: int | Tensor) -> int | Tensor:
    """The 64 bits that all positions of a substream share; for a tensor of substreams, one word each and the same bits."""
    stream_key = _mix_int(_mix_int(seed) ^ (stream * _GOLDEN))
    if isinstance(substream, int):
        return _signed(_mix_int(stream_key ^ (substream * _GOLDEN)))
    return _mix((substream * _signed(_GOLDEN) ^ _signed(stream_key)) + _signed(_GOLDEN))


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    """SplitMix64's finaliser on a Python integer."""
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK64
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK64
    return value ^ (value >> 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser, elementwise."""
    values = (values ^ _shift_right(values, 30)) * _signed(_MULTIPLIERS[0])
    values = (values ^ _shift_right(values, 27)) * _signed(_MULTIPLIERS[1])
    return values ^ _shift_right(values, 31)
