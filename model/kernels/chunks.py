"""How many tokens of a head are worked on at once."""

from collections.abc import Iterator

GRANULE = 128
"""Rows that a matrix product handles well."""


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
