"""The fixed shuffles between couplings (spec 1.3): of channels, or of tokens in one of three patterns.

The reference multiplies by 0/1 matrices; here they are index vectors, seeded, stored as buffers and in checkpoints.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import FlowConfig, ImageConfig

SPATIAL_CYCLE = ("checkerboard", "checkerboard-inv", "vstripes", "vstripes-inv", "hstripes", "hstripes-inv")
"""What successive couplings of kind `spatial` use (official models/proj/jet/jet.py)."""


def coupling_kinds(config: FlowConfig) -> list[str]:
    """The kind of each of the `depth` couplings, with `spatial` resolved to a pattern."""
    kinds: list[str] = []
    spatial_seen = 0
    for index in range(config.depth):
        kind: str = config.kinds[index % len(config.kinds)]
        if kind == "spatial":
            kind = SPATIAL_CYCLE[spatial_seen % len(SPATIAL_CYCLE)]
            spatial_seen += 1
        kinds.append(kind)
    return kinds


def build_permutation(kind: str, index: int, config: FlowConfig, image: ImageConfig) -> Tensor:
    """int64 indices p such that coupling `index` sees x[p]: over C channels, or over I tokens.

    A spatial pattern puts the tokens that condition first and those that are transformed second; `-inv` swaps them.
    """
    if kind == "channels":
        generator = torch.Generator().manual_seed(config.permutation_seed * 100_003 + index)
        return torch.randperm(image.token_dim, generator=generator)
    side = image.grid_size
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    pattern, _, inverted = kind.partition("-")
    second = {"checkerboard": (row + column) % 2, "vstripes": column % 2, "hstripes": row % 2}[pattern]
    if inverted:
        second = 1 - second
    return torch.argsort(second, stable=True)


@dataclass(frozen=True, slots=True)
class Order:
    """A permutation of C channels, y = x[index] and x = y[inverse]: int32 [C] each."""

    index: Tensor
    inverse: Tensor

    @staticmethod
    def identity(size: int, device: torch.device) -> "Order":
        """The permutation that changes nothing."""
        index = torch.arange(size, dtype=torch.int32, device=device)
        return Order(index, index)

    @staticmethod
    def between(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor] | None) -> "Order":
        """From x[p] to x[q], or to x: `source` is (p, inverse of p), `target` (q, inverse of q). Waits for no device."""
        permutation, inverse = source
        if target is not None:
            return Order(inverse[target[0]].int(), target[1][permutation].int())
        return Order(inverse.int(), permutation.int())


def invert(permutation: Tensor) -> Tensor:
    """q with x[p][q] = x."""
    return torch.argsort(permutation)
