"""One affine coupling of Jet (spec 1.3): half of the channels, or of the tokens, sets scale and shift of the other half.

Letters: B images, I tokens, C subpixels per token.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import stats
from model.batch import Batch
from model.config import JetFormerConfig
from model.flow.permutation import build_permutation, coupling_kinds, invert
from model.flow.rows import FlowRows
from model.flow.vit import CouplingNetwork
from model.kernels.config import KernelsConfig
from model.parallel import TensorParallel
from model.state import State

SATURATED_RAW_SCALE = 6.0
"""Above this 2*sigmoid(a) is within 0.5 % of its cap of 2."""


class Coupling(nn.Module):
    """y = x outside the transformed half, y2 = (x2 + b) * 2 sigmoid(a) in it, the original order restored after."""

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, config: JetFormerConfig, index: int, tp: TensorParallel | None = None, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        self.kernels = kernels or KernelsConfig()
        self.config = config
        self.tp = tp or TensorParallel.single()
        self.kind = coupling_kinds(config.flow)[index]
        self.spatial = self.kind != "channels"
        image = config.image
        self.dnn = CouplingNetwork(config.flow, in_dim=image.token_dim // 2, num_tokens=image.num_tokens)
        permutation = build_permutation(self.kind, index, config.flow, image)
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", invert(permutation), persistent=False)
        for parameter in self.parameters():
            # Each tensor-parallel rank sees its own images: the engine sums these gradients over the group.
            parameter.partial_gradient = True  # type: ignore[attr-defined]

    def set_permutation(self, permutation: Tensor) -> None:
        """Replaces the seeded permutation, for weights that come with their own."""
        self.permutation.copy_(permutation)
        self.inverse_permutation.copy_(invert(permutation))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.inverse_permutation.copy_(invert(self.permutation))

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 x [B, I, C] -> (y [B, I, C], log-determinant [B] in nats, raw scale [B, I, C/2])."""
        first, second = self._split(x)
        shift, raw_scale = self.dnn(first)
        log_scale = functional.logsigmoid(raw_scale) + math.log(2)
        y = self._merge(first, (second + shift) * torch.exp(log_scale))
        return y, log_scale.flatten(1).sum(1), raw_scale

    def inverse(self, y: Tensor) -> Tensor:
        """fp32 y [B, I, C] -> x [B, I, C]."""
        first, second = self._split(y)
        shift, raw_scale = self.dnn(first)
        log_scale = functional.logsigmoid(raw_scale) + math.log(2)
        return self._merge(first, second * torch.exp(-log_scale) - shift)

    def forward(self, state: State, batch: Batch) -> State:
        """Advances state.x, and adds this coupling's share of -log|det| to the loss."""
        assert state.x is not None
        rows = FlowRows.of(batch, self.config, self.tp)
        trained, frozen = state.x.split([rows.num_trained, rows.num_frozen])
        trained, logdet, raw_scale = self.transform(trained)
        if rows.num_frozen:
            with torch.no_grad():
                frozen = self.transform(frozen)[0]
            trained_and_frozen = torch.cat([trained, frozen])
        else:
            trained_and_frozen = trained
        scored = rows.scored(logdet)
        num_subpixels = self.config.image.num_subpixels
        to_bits = 1 / (num_subpixels * math.log(2))
        result = State(x=trained_and_frozen, aux=state.aux, stats=state.stats, outputs=state.outputs)
        result.add_aux(scored.sum() * (-to_bits / len(batch)))
        if batch.score_all:
            earlier = (state.outputs or {}).get("logdet", 0.0)
            result.record("logdet", earlier + logdet)
        if batch.log_stats:
            stats.add(result, "logdet_per_dim", scored.sum() / num_subpixels, count=0)
            self._record_bits(result, batch, logdet * -to_bits, rows)
            scored_scale = raw_scale[: rows.num_scored].detach()
            stats.add(result, "scale_saturation", (scored_scale > SATURATED_RAW_SCALE).sum(), count=scored_scale.numel())
        return result

    def _record_bits(self, state: State, batch: Batch, bits: Tensor, rows: FlowRows) -> None:
        if rows.placeholder:
            return
        stats.add(state, "image_bits", bits[: rows.num_text_first].sum(), count=0)
        stats.add(state, "loss", rows.scored(bits).sum(), count=0)
        if batch.scores_prefix(self.config.objective):
            stats.add(state, "image_bits_unconditional", bits[rows.num_text_first :].sum(), count=0)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.spatial:
            first, second = x.index_select(-1, self.permutation).chunk(2, dim=-1)
            return first, second
        # Half of the tokens with all channels, folded so that the network sees I tokens of C/2: "n (s c) -> (n s) c", s = 2.
        batch, tokens, dim = x.shape
        first, second = x.index_select(1, self.permutation).chunk(2, dim=1)
        return first.reshape(batch, tokens, dim // 2), second.reshape(batch, tokens, dim // 2)

    def _merge(self, first: Tensor, second: Tensor) -> Tensor:
        if not self.spatial:
            return torch.cat([first, second], dim=-1).index_select(-1, self.inverse_permutation)
        batch, tokens, half = first.shape
        halves = [part.reshape(batch, tokens // 2, 2 * half) for part in (first, second)]
        return torch.cat(halves, dim=1).index_select(1, self.inverse_permutation)


def encode(couplings: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    """All couplings in turn: fp32 x [B, I, C] -> (latents z [B, I, C], log-determinant [B] in nats)."""
    logdet = x.new_zeros(len(x))
    for coupling in couplings:
        assert isinstance(coupling, Coupling)
        x, term, _ = coupling.transform(x)
        logdet = logdet + term
    return x, logdet


def decode(couplings: nn.ModuleList, z: Tensor) -> Tensor:
    """The inverse of `encode`: latents z [B, I, C] -> x [B, I, C]."""
    for coupling in reversed(list(couplings)):
        assert isinstance(coupling, Coupling)
        z = coupling.inverse(z)
    return z
