"""Where a stored piece of a tensor lies in the whole: tensor-parallel slices, flat ranges, and their overlaps.

A piece is a flat range (ZeRO-1 partitions the flattened tensor) of a slice along one dimension (tensor parallelism) of the global
tensor. Both cut the tensor into a few boxes, each contiguous within its piece, and two boxes overlap in a box: so any piece can be
filled from any other pieces by a handful of strided copies, whichever way either was cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Box:
    """Hyper-rectangle of the global tensor: per dimension its start and size, and where it begins in its piece."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    offset: int
    """Flat position of the box's first element in the piece; the box is contiguous there."""

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return prod(self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """`flat_len` elements from `flat_start` of the flattened slice [shard_start, shard_start + shard_size) along `shard_dim`."""

    global_shape: tuple[int, ...]
    shard_dim: int | None
    """None: the slice is the whole tensor."""
    shard_start: int
    shard_size: int
    flat_start: int
    flat_len: int

    def __post_init__(self) -> None:
        if self.shard_dim is not None:
            if not 0 <= self.shard_dim < len(self.global_shape):
                raise ValueError(f"shard_dim={self.shard_dim} is no dimension of shape {self.global_shape}")
            total = self.global_shape[self.shard_dim]
            if self.shard_start < 0 or self.shard_size < 0 or self.shard_start + self.shard_size > total:
                raise ValueError(f"slice {self.shard_start}+{self.shard_size} leaves dimension {self.shard_dim} of {self.global_shape}")
        if self.flat_start < 0 or self.flat_len < 0 or self.flat_start + self.flat_len > prod(self.local_shape):
            raise ValueError(f"flat range {self.flat_start}+{self.flat_len} leaves the slice of shape {self.local_shape}")

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the tensor-parallel slice."""
        if self.shard_dim is None:
            return self.global_shape
        return (*self.global_shape[: self.shard_dim], self.shard_size, *self.global_shape[self.shard_dim + 1 :])

    def boxes(self) -> list[Box]:
        """The region as boxes of the global tensor: at most 2 * rank - 1 of them."""
        boxes, offset = [], 0
        for start, size in _range_boxes(self.local_shape, self.flat_start, self.flat_start + self.flat_len):
            if self.shard_dim is not None:
                moved = list(start)
                moved[self.shard_dim] += self.shard_start
                start = tuple(moved)
            boxes.append(Box(start, size, offset))
            offset += prod(size)
        return boxes


def _range_boxes(shape: tuple[int, ...], low: int, high: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, size) of the boxes that make up elements [low, high) of a row-major tensor, in order."""
    if low >= high:
        return
    if not shape:
        yield (), ()
        return
    row_size = prod(shape[1:])
    first_row, low_rest = divmod(low, row_size)
    last_row, high_rest = divmod(high, row_size)
    if low_rest:
        end = high_rest if first_row == last_row else row_size
        for start, size in _range_boxes(shape[1:], low_rest, end):
            yield (first_row, *start), (1, *size)
        if first_row == last_row:
            return
        first_row += 1
    if first_row < last_row:
        yield (first_row, *(0 for _ in shape[1:])), (last_row - first_row, *shape[1:])
    for start, size in _range_boxes(shape[1:], 0, high_rest):
        yield (last_row, *start), (1, *size)


def overlap(a: Box, b: Box) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(start, size) of what two boxes share, in global coordinates; None where they are apart."""
    starts, sizes = [], []
    for a_start, a_size, b_start, b_size in zip(a.start, a.size, b.start, b.size, strict=True):
        start = max(a_start, b_start)
        size = min(a_start + a_size, b_start + b_size) - start
        if size <= 0:
            return None
        starts.append(start)
        sizes.append(size)
    return tuple(starts), tuple(sizes)


def view_box(piece: Tensor, box: Box, start: tuple[int, ...], size: tuple[int, ...], *, piece_offset: int = 0) -> Tensor:
    """The part [start, start + size) (global coordinates) of `box` as a strided view of the 1-D tensor that holds it.

    Args:
        piece: 1-D tensor that holds the region's elements from `piece_offset` on.
        piece_offset: region position of `piece[0]`.
    """
    step = piece.stride(0)
    strides = [prod(box.size[dim + 1 :]) for dim in range(len(box.size))]
    first = box.offset - piece_offset + sum((s - b) * stride for s, b, stride in zip(start, box.start, strides, strict=True))
    return torch.as_strided(piece, size, [step * stride for stride in strides], piece.storage_offset() + step * first)


def box_span(box: Box, start: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, int]:
    """Smallest [low, high) range of the region that holds the part [start, start + size) of `box`."""
    low = high = box.offset
    for dim, (s, b, n) in enumerate(zip(start, box.start, size, strict=True)):
        stride = prod(box.size[dim + 1 :])
        low += (s - b) * stride
        high += (s - b + n - 1) * stride
    return low, high + 1
