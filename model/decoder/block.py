"""One decoder block (spec 1.6): x += drop(attention(norm(x))); x += drop(geglu(norm(x))).

Letters: B examples, S positions, D width, F MLP width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import sequence, streams
from model.batch import Batch
from model.config import DecoderConfig, JetFormerConfig
from model.decoder.attention import Attention, AttentionContext, KvCache
from model.decoder.norm import RmsNorm
from model.kernels.config import KernelsConfig
from model.parallel import TensorParallel, column_linear, copy_to_ranks, row_linear
from model.state import State
from model.streams import Stream


class GegluMlp(nn.Module):
    """gelu_tanh(x W_gate) * (x W_up) W_down, the hidden units split over tensor-parallel ranks."""

    def __init__(self, config: DecoderConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.gate = column_linear(config.width, config.mlp_dim, tp)
        self.up = column_linear(config.width, config.mlp_dim, tp)
        self.down = row_linear(config.mlp_dim, config.width, tp)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        shared = copy_to_ranks(x, self.tp)
        return self.down(functional.gelu(self.gate(shared), approximate="tanh") * self.up(shared))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with dropout on its output."""

    def __init__(self, config: JetFormerConfig, index: int, tp: TensorParallel, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        self.kernels = kernels or KernelsConfig()
        self.config = config
        self.index = index
        self.norm1 = RmsNorm(config.decoder.width)
        self.attn = Attention(config.decoder, tp)
        self.norm2 = RmsNorm(config.decoder.width)
        self.mlp = GegluMlp(config.decoder, tp)

    def forward(self, state: State, batch: Batch) -> State:
        """Advances state.hidden [B, S, D]."""
        x = state.hidden
        assert x is not None
        mask = sequence.key_mask(batch, self.config)
        context = AttentionContext.build(sequence.rope_positions(mask, x.shape[1], x.device), mask, self.config.decoder)
        x = x + self._dropout(self.attn(self.norm1(x), context), batch, branch=0)
        x = x + self._dropout(self.mlp(self.norm2(x)), batch, branch=1)
        return State(hidden=x, soft=state.soft, aux=state.aux, stats=state.stats, outputs=state.outputs)

    def decode(self, x: Tensor, context: AttentionContext, cache: KvCache | None) -> Tensor:
        """[B, S, D] -> [B, S, D] without dropout, continuing from `cache`: for sampling."""
        x = x + self.attn(self.norm1(x), context, cache)
        return x + self.mlp(self.norm2(x))

    def _dropout(self, x: Tensor, batch: Batch, *, branch: int) -> Tensor:
        """Drops elements as the stream says: alike on every tensor-parallel rank, whatever the layout."""
        probability = self.config.decoder.dropout
        if not batch.noise.train or probability == 0:
            return x
        keep = streams.keep_mask(
            batch.noise.seed, Stream.DROPOUT, batch.positions, x.shape[1:], drop_probability=probability, substream=2 * self.index + branch
        )
        return torch.where(keep, x / (1 - probability), 0)
