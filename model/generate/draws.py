"""Random numbers of sampling: each belongs to a seed, a sample's position, a token and a purpose, and to nothing else.

So a sample is the same whatever else is in its batch. Letters: B samples, K choices.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import streams
from model.streams import Stream

_UNITS = 2.0**48


class Purpose(enum.IntEnum):
    """What a number is drawn for."""

    COMPONENT = 0
    """Which mixture."""
    NOISE = 1
    """Where in its Gaussian."""
    PROPOSAL = 2
    ACCEPTANCE = 3
    """Rejection sampling, in chunks."""
    REST = 4
    """The factored-out dims of the latents."""
    PIECE = 5
    """Which text piece."""


@dataclass(frozen=True, slots=True)
class TokenDraws:
    """The random numbers of one token of each of B samples."""

    seed: int
    positions: Tensor
    """int64 [B], sample positions."""
    token: int | Tensor = 0
    """Which token; int64 [B]: one for each row, with the same numbers as that token by itself."""

    def uniform(self, purpose: Purpose, shape: Sequence[int] = (), *, chunk: int = 0) -> Tensor:
        """fp32 in [0, 1), [B, *shape]."""
        return streams.uniform(self.seed, Stream.SAMPLING, self.positions, shape, substream=self._substream(purpose, chunk))

    def normal(self, purpose: Purpose, shape: Sequence[int], *, chunk: int = 0) -> Tensor:
        """Standard normal fp32 [B, *shape]."""
        return streams.normal(self.seed, Stream.SAMPLING, self.positions, shape, substream=self._substream(purpose, chunk))

    def rows(self, index: Tensor) -> "TokenDraws":
        """The same numbers, for some of the samples."""
        return TokenDraws(self.seed, self.positions[index], self.token[index] if isinstance(self.token, Tensor) else self.token)

    def _substream(self, purpose: Purpose, chunk: int) -> int | Tensor:
        return (chunk << 32) | (self.token << 4) | purpose


def all_tokens(seed: int, positions: Tensor, num_tokens: int) -> TokenDraws:
    """The draws of tokens 0..I-1 of B samples, as rows [I * B] with the samples of one token side by side."""
    tokens = torch.arange(num_tokens, device=positions.device)
    return TokenDraws(seed, positions.repeat(num_tokens), tokens[:, None].expand(-1, len(positions)).flatten())


def categorical(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draws from softmax(logits) by inverting its distribution function: [B, K], [B] in [0, 1) -> int64 [B].

    Probabilities are counted in units of 2**-48: whole numbers add up to the same in any order, as a GPU's floating-point sums do not.
    """
    cumulative = (torch.softmax(logits.double(), dim=-1) * _UNITS).long().cumsum(-1)
    target = (uniform.double() * cumulative[:, -1]).long()
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
