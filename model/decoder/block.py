"""One decoder block (spec 1.6): x += drop(attention(norm(x))); x += drop(geglu(norm(x))).

Letters: B examples, S positions, D width, F MLP width.
"""

from torch import Tensor, nn

from model.batch import Batch
from model.config import DecoderConfig, JetFormerConfig
from model.decoder.attention import Attention, AttentionContext, KvCache
from model.decoder.context import DecoderContext
from model.decoder.norm import RmsNorm
from model.kernels.config import KernelsConfig
from model.kernels.geglu.interface import geglu
from model.kernels.inductor import run_compiled, vary_batch
from model.kernels.rms_norm.interface import add_dropout, add_dropout_rms_norm
from model.kernels.splitmix import DropoutKey
from model.parallel import TensorParallel, column_linear, copy_to_ranks, row_linear
from model.state import State


class GegluMlp(nn.Module):
    """gelu_tanh(x W_gate) * (x W_up) W_down, the hidden units split over tensor-parallel ranks."""

    def __init__(self, config: DecoderConfig, tp: TensorParallel, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        self.tp = tp
        self.kernels = kernels or KernelsConfig()
        self.gate = column_linear(config.width, config.mlp_dim, tp)
        self.up = column_linear(config.width, config.mlp_dim, tp)
        self.down = row_linear(config.mlp_dim, config.width, tp)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        shared = copy_to_ranks(x, self.tp)
        return self.down(geglu(self.gate(shared), self.up(shared), impl=self.kernels.geglu))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with dropout on its output."""

    def __init__(self, config: JetFormerConfig, index: int, tp: TensorParallel, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        self.kernels = kernels or KernelsConfig()
        self.config = config
        self.index = index
        # The collectives between tensor-parallel ranks would cut the block into pieces: there the kernels do better.
        self.compiles = self.kernels.compile == "layers" and tp.size == 1
        self.norm1 = RmsNorm(config.decoder.width, impl=self.kernels.rms_norm)
        self.attn = Attention(config.decoder, tp, self.kernels)
        self.norm2 = RmsNorm(config.decoder.width, impl=self.kernels.rms_norm)
        self.mlp = GegluMlp(config.decoder, tp, self.kernels)

    def forward(self, state: State, batch: Batch) -> State:
        """Advances state.hidden [B, S, D]."""
        x = state.hidden
        assert x is not None
        context = DecoderContext.build(batch, x, self.config) if state.context is None else state.context
        first, second = context.dropout(self.index, 0), context.dropout(self.index, 1)
        run = block_forward
        if self.compiles:
            x, attention = x.contiguous(), context.attention  # the first block gets a slice, and would have code of its own
            vary_batch(x, attention.cos, attention.sin, attention.mask, *(key.keys for key in (first, second) if key is not None))
            run = run_compiled(block_forward, x.device)
        hidden = run(self, x, context.attention, first, second)
        return State(hidden=hidden, soft=state.soft, aux=state.aux, stats=state.stats, outputs=state.outputs, context=context)

    def decode(self, x: Tensor, context: AttentionContext, cache: KvCache | None) -> Tensor:
        """[B, S, D] -> [B, S, D] without dropout, continuing from `cache`: for sampling."""
        return block_forward(self, x, context, None, None, cache)


def block_forward(
    block: Block, x: Tensor, context: AttentionContext, first: DropoutKey | None, second: DropoutKey | None, cache: KvCache | None = None
) -> Tensor:
    """[B, S, D] -> [B, S, D]; reads nothing of the block that differs between blocks but its weights, so that all share compiled code."""
    impl = block.kernels.rms_norm
    attended = block.attn(block.norm1(x), context, cache)
    x, normed = add_dropout_rms_norm(x, attended, block.norm2.scale, first, impl=impl)
    return add_dropout(x, block.mlp(normed), second, impl=impl)
