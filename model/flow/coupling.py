"""One affine coupling of Jet (spec 1.3): half of the channels, or of the tokens, sets scale and shift of the other half.

Letters: B images, I tokens, C subpixels per token.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model import stats
from model.batch import Batch
from model.config import JetFormerConfig
from model.flow.permutation import Order, build_permutation, coupling_kinds, invert
from model.flow.rows import FlowRows
from model.flow.vit import CouplingNetwork
from model.kernels.affine_coupling.interface import affine_coupling, affine_coupling_inverse
from model.kernels.config import KernelsConfig
from model.parallel import TensorParallel
from model.state import Latents, State

SATURATED_RAW_SCALE = 6.0
"""Above this 2*sigmoid(a) is within 0.5 % of its cap of 2."""


class Coupling(nn.Module):
    """y = x outside the transformed half, y2 = (x2 + b) * 2 sigmoid(a) in it, the original order restored after.

    A coupling of channels that is linked to another (`link_couplings`) hands over its latents in the order of that one instead, and saves
    a permutation.
    """

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
        self.dnn = CouplingNetwork(config.flow, in_dim=image.token_dim // 2, num_tokens=image.num_tokens, kernels=self.kernels)
        permutation = build_permutation(self.kind, index, config.flow, image)
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", invert(permutation), persistent=False)
        # Tuple and dictionary, which nn.Module does not take for submodules.
        self._following: tuple[Coupling, ...] = ()
        self._orders: dict[tuple[int, int], tuple[list[Tensor], list[int], Order]] = {}
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

    def link(self, following: "Coupling | None") -> None:
        """Sets which layer reads the output of `forward` as it is; None: any layer may."""
        self._following = () if following is None or self.spatial or following.spatial else (following,)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 x [B, I, C] -> (y [B, I, C], log-determinant [B] in nats, raw scale [B, I, C/2])."""
        (y,), logdet, raw_scale = self.advance((x,))
        return y, logdet, raw_scale

    def inverse(self, y: Tensor) -> Tensor:
        """fp32 y [B, I, C] -> x [B, I, C]."""
        return self.retreat((y,))[0]

    def advance(self, latents: tuple[Tensor, ...], following: "Coupling | None" = None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The coupling, in the order of its neighbours.

        Args:
            latents: fp32 (x [B, I, C],), or the two halves [B, I, C/2] of this coupling.
            following: return the two halves of that coupling, not (y [B, I, C],).

        Returns:
            (latents, log-determinant [B] in nats, raw scale [B, I, C/2]).
        """
        first, second = self._halves(latents)
        params = self.dnn(first)
        order = self._order_for(following)
        joined = following is None and not self.spatial
        out, logdet = affine_coupling(first, second, params, order.index, order.inverse, joined=joined, impl=self.kernels.affine_coupling)
        return (self._merge_tokens(out) if self.spatial else out), logdet, params[..., first.shape[-1] :]

    def retreat(self, latents: tuple[Tensor, ...], previous: "Coupling | None" = None) -> tuple[Tensor, ...]:
        """The inverse, likewise: y or its halves -> (x [B, I, C],), or the halves of the output of `previous`."""
        first, second = self._halves(latents)
        params = self.dnn(first)
        order = self._order_for(previous)
        joined = previous is None and not self.spatial
        out = affine_coupling_inverse(first, second, params, order.index, joined=joined, impl=self.kernels.affine_coupling)
        return self._merge_tokens(out) if self.spatial else out

    def forward(self, state: State, batch: Batch) -> State:
        """Advances state.x or state.latents, and adds this coupling's share of -log|det| to the loss."""
        rows = FlowRows.of(batch, self.config, self.tp)
        latents = state.latents or self._split_rows(state.x, rows)
        assert latents.reader is None or latents.reader is self, "the latents stand in the order of another coupling"
        following = self._following[0] if self._following else None
        trained, logdet, raw_scale = self.advance(latents.trained, following)
        scored = rows.scored(logdet)
        num_subpixels = self.config.image.num_subpixels
        to_bits = 1 / (num_subpixels * math.log(2))
        result = State(aux=state.aux, stats=state.stats, outputs=state.outputs)
        result.add_aux(scored.sum() * (-to_bits / len(batch)))
        if batch.score_all:
            earlier = (state.outputs or {}).get("logdet", 0.0)
            result.record("logdet", earlier + logdet)
        if batch.log_stats:
            stats.add(result, "logdet_per_dim", scored.sum() / num_subpixels, count=0)
            self._record_bits(result, batch, logdet * -to_bits, rows)
            scored_scale = raw_scale[: rows.num_scored].detach()
            stats.add(result, "scale_saturation", (scored_scale > SATURATED_RAW_SCALE).sum(), count=scored_scale.numel())
        frozen = None
        if latents.frozen is not None:
            # Last: a recomputation for the backward pass ends before it.
            with torch.no_grad():
                frozen = self.advance(latents.frozen, following)[0]
        result.latents = Latents(trained, frozen, following)
        return result

    def _record_bits(self, state: State, batch: Batch, bits: Tensor, rows: FlowRows) -> None:
        if rows.placeholder:
            return
        stats.add(state, "image_bits", bits[: rows.num_text_first].sum(), count=0)
        stats.add(state, "loss", rows.scored(bits).sum(), count=0)
        if batch.scores_prefix(self.config.objective):
            stats.add(state, "image_bits_unconditional", bits[rows.num_text_first :].sum(), count=0)

    @staticmethod
    def _split_rows(x: Tensor | None, rows: FlowRows) -> Latents:
        assert x is not None
        trained, frozen = rows.split(x)
        return Latents((trained,), None if frozen is None else (frozen,))

    def _halves(self, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(latents) == 2:
            return latents
        (x,) = latents
        if not self.spatial:
            return x.index_select(-1, self.permutation).chunk(2, dim=-1)
        # Half of the tokens with all channels, folded so that the network sees I tokens of C/2: "n (s c) -> (n s) c", s = 2.
        batch, tokens, dim = x.shape
        first, second = x.index_select(1, self.permutation).chunk(2, dim=1)
        return first.reshape(batch, tokens, dim // 2), second.reshape(batch, tokens, dim // 2)

    def _merge_tokens(self, halves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        batch, tokens, half = halves[0].shape
        unfolded = [part.reshape(batch, tokens // 2, 2 * half) for part in halves]
        return (torch.cat(unfolded, dim=1).index_select(1, self.inverse_permutation),)

    def _order_for(self, other: "Coupling | None") -> Order:
        """From this coupling's order of the channels to that of `other`, or to that of the subpixels."""
        layers = [self] if other is None else [self, other]
        buffers = [buffer for layer in layers for buffer in (layer.permutation, layer.inverse_permutation)]
        if any(buffer.is_inference() for buffer in buffers):
            return self._build_order(buffers)  # inference tensors do not tell when they change
        # Permutations change under load_state_dict and set_permutation, and move with the module. Kept buffers keep their identity.
        versions = [buffer._version for buffer in buffers]
        kept = self._orders.get((id(self), id(other)))
        if kept is None or kept[1] != versions or any(a is not b for a, b in zip(kept[0], buffers, strict=True)):
            with torch.inference_mode(False):  # what is kept serves training as well
                kept = self._orders[id(self), id(other)] = (buffers, versions, self._build_order(buffers))
        return kept[2]

    def _build_order(self, buffers: list[Tensor]) -> Order:
        if self.spatial:  # tokens change places, channels do not
            return Order.identity(self.config.image.token_dim, buffers[0].device)
        return Order.between((buffers[0], buffers[1]), (buffers[2], buffers[3]) if len(buffers) > 2 else None)


def link_couplings(layers: Iterable[nn.Module]) -> None:
    """Links each coupling among consecutive layers to the one that comes right after it."""
    layers = list(layers)
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        if isinstance(layer, Coupling):
            layer.link(following if isinstance(following, Coupling) else None)


def encode(couplings: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    """All couplings in turn: fp32 x [B, I, C] -> (latents z [B, I, C], log-determinant [B] in nats)."""
    logdet = x.new_zeros(len(x))
    latents: tuple[Tensor, ...] = (x,)
    for coupling, following in _neighbours(list(couplings)):
        latents, term, _ = coupling.advance(latents, following)
        logdet = logdet + term
    return latents[0], logdet


def decode(couplings: nn.ModuleList, z: Tensor) -> Tensor:
    """The inverse of `encode`: latents z [B, I, C] -> x [B, I, C]."""
    latents: tuple[Tensor, ...] = (z,)
    for coupling, previous in _neighbours(list(couplings)[::-1]):
        latents = coupling.retreat(latents, previous)
    return latents[0]


def _neighbours(layers: list[nn.Module]) -> Iterator[tuple[Coupling, Coupling | None]]:
    """Each coupling with the one after it, where both permute channels."""
    for layer, other in itertools.zip_longest(layers, layers[1:]):
        assert isinstance(layer, Coupling)
        yield layer, other if isinstance(other, Coupling) and not (layer.spatial or other.spatial) else None
