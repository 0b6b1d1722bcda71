"""How many tokens of a head are worked on at once."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

GRANULE = 128
"""Rows that a matrix product handles well."""


def largest_share(own: int, total: int | None, group: Any) -> int:
    """Classes of the rank that holds the most, of `total` split as evenly as can be; `own` where there is one rank.

    All ranks must cut the tokens alike, or their collectives do not meet.

    Raises:
        ValueError: there is a group and `total` is not given.
    """
    if group is None:
        return own
    if total is None:
        raise ValueError("with a process group the number of classes over all its ranks must be given")
    return -(-total // dist.get_world_size(group))


def split_tokens(num_tokens: int, *, bytes_per_token: int, workspace_bytes: int) -> Iterator[slice]:
    """Consecutive ranges of tokens, as equal as the granule allows, each with at most `workspace_bytes` (but one token at least)."""
    most = max(1, workspace_bytes // max(1, bytes_per_token))
    if most >= GRANULE:
        most -= most % GRANULE
    size = most
    if num_tokens > most:
        size = -(-num_tokens // -(-num_tokens // most))  # even shares of as few chunks
        size = min(most, -(-size // GRANULE) * GRANULE)
    for start in range(0, num_tokens, max(1, size)):
        yield slice(start, min(num_tokens, start + size))
