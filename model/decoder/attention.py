"""Causal attention with grouped key-value heads (spec 1.6), split over tensor-parallel ranks by query heads.

Letters: B examples, S query positions, P key positions (cached ones included), D width, N query heads, G key-value heads, H head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import DecoderConfig
from model.decoder.rope import rope_tables
from model.kernels.config import KernelsConfig
from model.kernels.rope.interface import apply_rope
from model.parallel import TensorParallel, column_linear, copy_to_ranks, row_linear


@dataclass(slots=True)
class AttentionContext:
    """What every block of one forward pass shares: rotary tables and the mask."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    """bool, broadcastable to [B, 1, S, P]; None means plain causal attention."""

    @staticmethod
    def build(positions: Tensor, key_mask: Tensor | None, config: DecoderConfig) -> "AttentionContext":
        """For a whole sequence: int64 positions [B or 1, S], bool key_mask [B, S] or None."""
        cos, sin = rope_tables(positions, config.head_dim)
        if key_mask is None:
            return AttentionContext(cos, sin, None)
        length = key_mask.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=key_mask.device).tril()
        return AttentionContext(cos, sin, causal & key_mask[:, None, None, :])


class KvCache:
    """Keys and values of the positions seen so far, in buffers of a fixed length."""

    def __init__(self, *, batch_size: int, num_kv_heads: int, length: int, head_dim: int, like: Tensor) -> None:
        shape = (batch_size, num_kv_heads, length, head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, G, S, H] and returns everything so far, [B, G, P, H]."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """Multi-query or grouped-query attention. No biases."""

    def __init__(self, config: DecoderConfig, tp: TensorParallel, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels or KernelsConfig()
        self.tp = tp
        query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.splits_kv = config.num_kv_heads % tp.size == 0
        self.q = column_linear(config.width, query_dim, tp)
        kv_tp = tp if self.splits_kv else TensorParallel.single()
        self.k = column_linear(config.width, kv_dim, kv_tp)
        self.v = column_linear(config.width, kv_dim, kv_tp)
        self.out = row_linear(query_dim, config.width, tp)

    def forward(self, x: Tensor, context: AttentionContext, cache: KvCache | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        shared = copy_to_ranks(x, self.tp)
        q = self._heads(self.q(shared))
        k, v = self._keys_and_values(x, shared)
        q, k = (apply_rope(heads, context.cos, context.sin, impl=self.kernels.rope) for heads in (q, k))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(self._attend(q, k, v, context.mask).transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, S, H], keys and values [B, G, P, H] -> [B, N, S, H]."""
        group = q.shape[1] // k.shape[1]
        if q.shape[2] == 1:
            # One position, as in sampling: the query heads of a group are so many queries of one head, and no key is copied.
            return functional.scaled_dot_product_attention(q.unflatten(1, (-1, group)).squeeze(3), k, v, attn_mask=mask).flatten(1, 2).unsqueeze(2)
        if group > 1 and mask is None and q.is_cuda:
            # Flash attention reads the few heads there are. The kernels that take a mask, and those of a CPU, want one per query head.
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if group > 1:
            k, v = (t.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    def _keys_and_values(self, x: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G of this rank, S, H] each.

        A key-value head that several ranks need is computed by all of them from x, and the gradients of its keys and values
        are summed over the ranks: so its weight gradients are whole, and alike, everywhere, as is the gradient of x.
        """
        if self.splits_kv:
            return self._heads(self.k(shared)), self._heads(self.v(shared))
        k, v = (copy_to_ranks(self._heads(linear(x)), self.tp) for linear in (self.k, self.v))
        own = self.tp.rank * self.config.num_kv_heads // self.tp.size
        return k[:, own : own + 1], v[:, own : own + 1]

    def _heads(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, -1, self.config.head_dim).transpose(1, 2)


def new_cache(config: DecoderConfig, *, batch_size: int, length: int, like: Tensor) -> list[KvCache]:
    """One empty cache per block, for `length` positions."""
    shape = {"batch_size": batch_size, "num_kv_heads": config.num_kv_heads, "length": length, "head_dim": config.head_dim}
    return [KvCache(**shape, like=like) for _ in range(config.depth)]
