"""JetFormer as a plain list of layers: what one process runs in turn, and what the pipeline partitioner cuts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from model import flops
from model.config import JetFormerConfig
from model.decoder.block import Block
from model.flow.coupling import Coupling
from model.heads.loss import Head
from model.kernels.config import KernelsConfig
from model.parallel import TensorParallel
from model.patchify import Patchify
from model.sequence import SequenceEmbedding


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer, not yet built. Every layer maps (State, Batch) to a State."""

    name: str
    """Prefix of the layer's parameters in every checkpoint: patchify, couplings.0, ..., embed, blocks.0, ..., head."""
    kind: Literal["patchify", "coupling", "embed", "block", "head"]
    build: Callable[[], nn.Module]
    flops: float
    """Forward FLOPs per example."""
    training_flops: float
    """Forward and backward FLOPs per example, exact skips left out (spec 1.13): what balances pipeline stages."""

    @property
    def in_flow(self) -> bool:
        """Whether its output is a flow state (model.state.pack)."""
        return self.kind in ("patchify", "coupling")


def layer_specs(config: JetFormerConfig, tp: TensorParallel | None = None, kernels: KernelsConfig | None = None) -> list[LayerSpec]:
    """The layers in order; `kernels` says how they compute, not what."""
    tp, kernels = tp or TensorParallel.single(), kernels or KernelsConfig()
    objective = config.objective
    image_share = 1.0 if objective.loss_on_prefix else objective.text_first_probability
    text_share = 1.0 if objective.loss_on_prefix else 1.0 - objective.text_first_probability
    flow_backward = 2 * (image_share if objective.stop_grad_flow_on_image_prefix else 1.0)
    coupling, block = flops.coupling_flops(config), flops.block_flops(config)
    image_head, text_head, embed = flops.gmm_head_flops(config), flops.text_head_flops(config), flops.embed_flops(config)
    return [
        LayerSpec("patchify", "patchify", partial(Patchify, config, tp), 0.0, 0.0),
        *(
            LayerSpec(f"couplings.{i}", "coupling", partial(Coupling, config, i, tp, kernels), coupling, coupling * (1 + flow_backward))
            for i in range(config.flow.depth)
        ),
        LayerSpec("embed", "embed", partial(SequenceEmbedding, config, tp), embed, 3 * embed),
        *(LayerSpec(f"blocks.{i}", "block", partial(Block, config, i, tp, kernels), block, 3 * block) for i in range(config.decoder.depth)),
        LayerSpec(
            "head", "head", partial(Head, config, tp, kernels), image_head + text_head, 3 * (image_share * image_head + text_share * text_head)
        ),
    ]
