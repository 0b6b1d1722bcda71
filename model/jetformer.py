"""JetFormer in one process (arXiv 2411.19722): the layer list run in turn, and what sampling needs of its parts.

Letters: B examples, T text slots, I image tokens, C subpixels per token, d soft channels.
"""

from typing import cast

import torch
from torch import Tensor, nn

from model import init
from model.batch import Batch
from model.config import JetFormerConfig
from model.decoder.block import Block
from model.flow.coupling import Coupling, decode, encode, link_couplings
from model.heads.loss import Head
from model.kernels.config import KernelsConfig
from model.layers import layer_specs
from model.parallel import TensorParallel
from model.patchify import Patchify
from model.sequence import SequenceEmbedding
from model.state import State


class JetFormer(nn.Module):
    """All layers of one model, under the names that checkpoints use."""

    def __init__(self, config: JetFormerConfig, tp: TensorParallel | None = None, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        self.config = config
        built = [(spec.kind, spec.build()) for spec in layer_specs(config, tp, kernels)]
        by_kind = {kind: [module for k, module in built if k == kind] for kind, _ in built}
        self.patchify = cast(Patchify, by_kind["patchify"][0])
        self.couplings = nn.ModuleList(by_kind.get("coupling", []))
        link_couplings(self.couplings)
        self.embed = cast(SequenceEmbedding, by_kind["embed"][0])
        self.blocks = nn.ModuleList(by_kind.get("block", []))
        self.head = cast(Head, by_kind["head"][0])

    def forward(self, batch: Batch) -> State:
        """Runs every layer; the loss is `state.total_loss()`, metrics are in `state.stats` and `state.outputs`."""
        state = self.patchify(State(), batch)
        for layer in (*self.couplings, self.embed, *self.blocks, self.head):
            state = layer(state, batch)
        return state

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens fp32 [B, I, C] -> (latents [B, I, C], log-determinant [B] in nats)."""
        return encode(self.couplings, x)

    def decode(self, z: Tensor) -> Tensor:
        """Latents fp32 [B, I, C] -> patch tokens [B, I, C], the inverse of `encode`."""
        return decode(self.couplings, z)

    def coupling(self, index: int) -> Coupling:
        """One coupling of the flow."""
        return cast(Coupling, self.couplings[index])

    def block(self, index: int) -> Block:
        """One block of the decoder."""
        return cast(Block, self.blocks[index])


def build_jetformer(config: JetFormerConfig, *, seed: int = 0, device: torch.device | str = "cpu", kernels: KernelsConfig | None = None) -> JetFormer:
    """An initialised model; the same seed gives the same weights as in any parallel layout."""
    model = JetFormer(config, kernels=kernels)
    init.initialise(model.named_parameters(), config, seed)
    return model.to(device)
