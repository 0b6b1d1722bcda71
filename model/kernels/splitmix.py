"""SplitMix64 in counter mode (Steele, Lea, Flood 2014: "Fast splittable pseudorandom number generators") on int64 tensors.

`model.streams` makes every random draw of the project with it. The dropout masks live here, as kernels regenerate them in registers:
the one place with the constants, and with the rule that maps (key, element) to a decision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
LANES = 4
"""Draws of 16 bits in one word, the lowest bits first."""

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """Which elements of one branch of one layer are dropped: element i of sample b by bits 16 (i % 4) ... of word i // 4 of stream keys[b]."""

    keys: Tensor
    """int64 [B], one per sample (`model.streams.substream_keys`)."""
    probability: float
    """Of being dropped, in [0, 1); exact to 2**-16."""

    @property
    def threshold(self) -> int:
        """A draw, as a number in [0, 2**16) with its highest bit flipped, is kept from here on."""
        return round(self.probability * 2**16)


def signed(value: int) -> int:
    """The int64 with the low 64 bits of a Python integer."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def mix_int(value: int) -> int:
    """One step of SplitMix64 on a Python integer: the increment, then the finaliser."""
    value = (value + GOLDEN) & _MASK64
    value = ((value ^ (value >> SHIFTS[0])) * MULTIPLIERS[0]) & _MASK64
    value = ((value ^ (value >> SHIFTS[1])) * MULTIPLIERS[1]) & _MASK64
    return value ^ (value >> SHIFTS[2])


def shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix(values: Tensor) -> Tensor:
    """The finaliser, elementwise on int64; multiplication wraps as needed. Works in one new tensor: memory traffic is its cost."""
    for bits, multiplier in zip(SHIFTS[:2], MULTIPLIERS, strict=True):
        values = _xor_shifted(values, bits).mul_(signed(multiplier))
    return _xor_shifted(values, SHIFTS[2])


def _xor_shifted(values: Tensor, bits: int) -> Tensor:
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1).bitwise_xor_(values)


def random_words(keys: Tensor, num_words: int) -> Tensor:
    """int64 [B, num_words], 64 random bits each, for keys int64 [B]."""
    # j + 1 as -~j and GOLDEN by halves, for torch.compile: a plain range times a constant it would take for an index, whose exact integers
    # overflow its printer, and of a product whose sign it knows a C++ compiler assumes that it does not wrap.
    complement = torch.arange(num_words, device=keys.device, dtype=torch.int64).bitwise_not()
    counters = complement * -(GOLDEN & 0xFFFFFFFF) + (complement * -(GOLDEN >> 32) << 32)
    return mix(keys[:, None] + counters)


def keep_mask(dropout: DropoutKey, shape: Sequence[int]) -> Tensor:
    """Bool [B, *shape], True with probability 1 - dropout.probability: four draws per word."""
    count, keys = math.prod(shape), dropout.keys
    words = random_words(keys, (count + LANES - 1) // LANES)
    if torch.compiler.is_compiling():
        # The same bits by shifts, which a compiler fuses with what follows; a view of another width it would write to memory first.
        # The left shift puts a lane on top and the arithmetic right shift brings it down with its sign.
        left = torch.arange(64 - 16, -1, -16, device=keys.device)
        lanes = ((words[:, :, None] << left) >> (64 - 16)).flatten(1)
    else:
        lanes = words.view(torch.int16)
    return (lanes[:, :count] >= dropout.threshold - 2**15).reshape(len(keys), *shape)
