"""What passes from layer to layer, and the one tensor in which it crosses a pipeline edge.

Letters: B examples, I image tokens, S sequence, D model width, C subpixels per token, d soft channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from model.decoder.context import DecoderContext


@dataclass(frozen=True, slots=True)
class Latents:
    """What a coupling leaves. Images with and without gradient stay apart (model.flow.rows): no coupling copies them together."""

    trained: tuple[Tensor, ...]
    """fp32: one tensor [rows, I, C]; or two halves [rows, I, C/2], permuted for `reader`."""
    frozen: tuple[Tensor, ...] | None = None
    """Likewise, without gradient."""
    reader: nn.Module | None = None
    """The one coupling that can read the halves."""

    def joined(self) -> Tensor:
        """[rows, I, C], the trained images first."""
        assert self.reader is None, "the latents stand in the order of the next coupling"
        return self.trained[0] if self.frozen is None else torch.cat([self.trained[0], self.frozen[0]])


@dataclass(slots=True)
class State:
    """Before `embed` the flow's latents; after it hidden states with the soft tokens that the last layer scores."""

    x: Tensor | None = None
    """fp32 [rows, I, C], this tensor-parallel rank's images (model.flow.rows): from `patchify`, and across an edge."""
    latents: Latents | None = None
    """After a coupling, in place of x."""
    hidden: Tensor | None = None
    """[B, S, D]."""
    soft: Tensor | None = None
    """fp32 [B, I, d]: the first channels of the latents, input and target of the decoder."""
    aux: Tensor | None = None
    """Scalar: loss terms of the layers seen so far on this stage that need nothing from later ones (spec 1.8:
    log-determinant, factored-out dims). Added to the loss, or attached to the outgoing edge by `attach_aux`."""
    loss: Tensor | None = None
    """Scalar, set by the head: the other terms, averaged over the micro-batch."""
    stats: Tensor | None = None
    """fp64 [2, metrics]: sums and counts (model.stats)."""
    outputs: dict[str, Tensor] | None = None
    """Per-example results, where a batch asks for all scores."""
    context: "DecoderContext | None" = None
    """What the decoder's blocks share (masks, tables): set by the first of a stage, never sent to another one."""

    def join_latents(self) -> None:
        """Latents as x, for an edge."""
        if self.latents is not None:
            self.x, self.latents = self.latents.joined(), None

    def add_aux(self, term: Tensor) -> None:
        """Adds a local loss term."""
        self.aux = term if self.aux is None else self.aux + term

    def record(self, name: str, value: Tensor) -> None:
        """Keeps a per-example result under `name`."""
        if self.outputs is None:
            self.outputs = {}
        self.outputs[name] = value

    def total_loss(self) -> Tensor:
        """The whole loss, where all layers ran in one process."""
        assert self.loss is not None
        return self.loss if self.aux is None else self.loss + self.aux


def pack(state: State, dtype: torch.dtype = torch.float32) -> Tensor:
    """The state as one tensor: x before `embed`, else [hidden || soft], flattened per example: [B, S*D + I*d].

    Latents and soft tokens stay fp32 through a bf16 edge: their bits travel as pairs of bf16 lanes, exactly, both ways.
    DeepSpeed runs the upstream backward once per tensor of an edge, hence one tensor.

    Args:
        dtype: of the edges that carry x, [rows, I, C] or [rows, I, 2*C]. All edges of a run must have one dtype: a stage of
            DeepSpeed receives activations and gradients into one buffer.
    """
    if state.hidden is None:
        assert state.x is not None
        return state.x if dtype == torch.float32 else _FloatToLanes.apply(state.x, dtype)
    assert state.soft is not None
    lanes = state.soft if state.hidden.dtype == state.soft.dtype else _FloatToLanes.apply(state.soft, state.hidden.dtype)
    return torch.cat([state.hidden.flatten(1), lanes.flatten(1)], dim=1)


def unpack(edge: Tensor, *, flow: bool, width: int, num_tokens: int, soft_dim: int) -> State:
    """The inverse of `pack`.

    Args:
        flow: the edge leaves a layer of the flow.
        width: D; num_tokens: I; soft_dim: d.
    """
    if flow:
        return State(x=edge if edge.dtype == torch.float32 else _LanesToFloat.apply(edge))
    batch = len(edge)
    lanes_per_float = 1 if edge.dtype == torch.float32 else 2
    soft_size = num_tokens * soft_dim * lanes_per_float
    # split, not slices: the backward of a slice adds zeros to bit patterns, that of split concatenates them.
    hidden, lanes = edge.split([edge.shape[1] - soft_size, soft_size], dim=1)
    lanes = lanes.reshape(batch, num_tokens, soft_dim * lanes_per_float)
    soft = lanes if lanes_per_float == 1 else _LanesToFloat.apply(lanes)
    return State(hidden=hidden.reshape(batch, -1, width), soft=soft)


def attach_aux(edge: Tensor, aux: Tensor, scale: float) -> Tensor:
    """Returns `edge`; its backward pass also sends the gradient `scale` into `aux` (Megatron's MoEAuxLossAutoScaler idea)."""
    return _AttachAux.apply(edge, aux, scale)


class _FloatToLanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.contiguous().view(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.contiguous().view(torch.float32), None


class _LanesToFloat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return x.contiguous().view(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous().view(ctx.dtype)


class _AttachAux(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, edge: Tensor, aux: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype, ctx.device = scale, aux.dtype, aux.device
        return edge.view_as(edge)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=ctx.device), None
