"""The decoder over sequences that grow, the keys and values of earlier positions kept.

Letters: B rows, S new positions, P positions with the cached ones, D width.
"""

import torch
from torch import Tensor

from model.decoder.attention import AttentionContext, new_cache
from model.decoder.rope import rope_tables
from model.jetformer import JetFormer


class CachedDecoder:
    """All blocks and the final norm of a model, fed piece by piece; equal to one pass over the whole sequence."""

    def __init__(self, model: JetFormer, *, batch_size: int, length: int) -> None:
        """
        Args:
            batch_size: B, fixed.
            length: the most positions that will be fed.
        """
        self.model = model
        self.batch_size = batch_size
        self.caches = new_cache(model.config.decoder, batch_size=batch_size, length=length, like=model.embed.image.weight)
        self.length = 0
        """Positions fed so far."""
        self.key_mask: Tensor | None = None
        """bool [B, length], False for positions that nobody attends to; None while there are none."""

    def extend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feeds S more positions.

        Args:
            x: [B, S, D], embedded.
            mask: bool [B, S], False for pads, which later positions neither see nor count (spec 1.5); None: there are none.

        Returns:
            What the heads read, [B, S, D].
        """
        context = self._context(x, mask)
        for index, cache in enumerate(self.caches):
            x = self.model.block(index).decode(x, context, cache)
        self.length += x.shape[1]
        return self.model.head.norm(x)

    def take(self, rows: Tensor, *, extra: int) -> "CachedDecoder":
        """A decoder whose row i goes on from row `rows[i]` of this one, with room for `extra` more positions: prefixes are read once."""
        taken = CachedDecoder(self.model, batch_size=len(rows), length=self.length + extra)
        for old, new in zip(self.caches, taken.caches, strict=True):
            new.append(old.keys[rows, :, : old.length], old.values[rows, :, : old.length])
        taken.length = self.length
        if self.key_mask is not None:
            taken.key_mask = self.key_mask[rows]
        return taken

    def _context(self, x: Tensor, mask: Tensor | None) -> AttentionContext:
        """Rotary tables of the new positions, and what they may see."""
        start, new = self.length, x.shape[1]
        if mask is None and self.key_mask is None:
            positions = torch.arange(start, start + new, device=x.device)[None]
            cos, sin = rope_tables(positions, self.model.config.decoder.head_dim)
            # One position sees all there is; from an empty cache plain causal attention is right.
            return AttentionContext(cos, sin, None if new == 1 or start == 0 else self._causal(x))
        shape = (self.batch_size, start)
        old_mask = torch.ones(shape, dtype=torch.bool, device=x.device) if self.key_mask is None else self.key_mask
        new_mask = torch.ones(self.batch_size, new, dtype=torch.bool, device=x.device) if mask is None else mask
        self.key_mask = torch.cat([old_mask, new_mask], dim=1)
        positions = torch.cumsum(self.key_mask.long(), dim=1)[:, start:] - 1
        cos, sin = rope_tables(positions, self.model.config.decoder.head_dim)
        return AttentionContext(cos, sin, self._causal(x) & self.key_mask[:, None, None, :])

    def _causal(self, x: Tensor) -> Tensor:
        """bool [S, P]."""
        new = x.shape[1]
        return torch.ones(new, self.length + new, dtype=torch.bool, device=x.device).tril(self.length)
