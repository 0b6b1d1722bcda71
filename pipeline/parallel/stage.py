"""One pipeline stage as one module: some consecutive layers, the micro-batches they read, and the one tensor they pass on.

Every rank of a pipeline reads the same micro-batches itself (each stage needs text and masks), so only the packed edge travels.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.batch import Batch
from model.config import JetFormerConfig
from model.flow.coupling import link_couplings
from model.jetformer import JetFormer
from model.layers import LayerSpec
from model.state import Latents, State, attach_aux, pack, unpack
from model.stats import METRICS
from pipeline.config import Recompute

RECOMPUTED: dict[Recompute, tuple[str, ...]] = {"none": (), "flow": ("coupling",), "decoder": ("block",), "full": ("coupling", "block")}
"""Kinds of layer that a setting recomputes."""


class MicroBatchFeed:
    """Hands micro-batch k of a step to the k-th forward pass of the step: 1F1B runs forward passes in order on every stage."""

    def __init__(self) -> None:
        self._queue: deque[Batch] = deque()

    def load(self, batches: Sequence[Batch]) -> None:
        """Takes the micro-batches of one step."""
        assert not self._queue, f"{len(self._queue)} micro-batches of the step before were not used"
        self._queue.extend(batches)

    def next(self) -> Batch:
        """The next one in order."""
        return self._queue.popleft()

    def clear(self) -> None:
        """Forgets what is left, after a step that failed."""
        self._queue.clear()


class PipelineStage(nn.Module):
    """Consecutive layers of the model; its parameters have their global names.

    `forward(edge)` takes the next micro-batch from `feed` and returns the outgoing edge, or the scalar loss on the last stage.
    """

    def __init__(
        self, specs: Sequence[LayerSpec], *, config: JetFormerConfig, previous: LayerSpec | None, is_last: bool, recompute: Recompute = "none"
    ) -> None:
        """Builds the layers.

        Args:
            specs: the stage's part of `model.layers.layer_specs`.
            previous: the layer whose output is the incoming edge; None on the first stage.
            is_last: return the loss.
            recompute: which layers keep only their inputs in the forward pass, and run again in the backward pass. The head, whose outputs are
                the largest, keeps none of them in any case (model.kernels.gmm_nll).
        """
        super().__init__()
        self.specs = tuple(specs)
        self.previous, self.is_last, self.recompute = previous, is_last, recompute
        self.feed = MicroBatchFeed()
        self.num_micro_batches = 1
        self.stats = StatsSink()
        self.terms: list[Tensor] = []
        """This stage's share of the loss of each micro-batch of the step, to find the one that is not finite."""
        self._config = config
        self._layers: list[nn.Module] = []
        for spec in specs:
            layer = spec.build()
            _add_under_name(self, spec.name, layer)
            self._layers.append(layer)
        link_couplings(self._layers)

    def forward(self, edge: Tensor) -> Tensor:
        """Runs the next micro-batch; the first stage ignores `edge`."""
        state = self.run(edge, self.feed.next())
        self.stats.add(state.stats)
        if self.is_last:
            loss = state.total_loss()
            self.terms.append(loss.detach())
            return loss
        if state.aux is not None:
            self.terms.append(state.aux.detach())
        outgoing = self.pack(state)
        if state.aux is not None and state.aux.requires_grad:
            # The engine divides the loss of the last stage by the number of micro-batches; this term never goes there.
            outgoing = attach_aux(outgoing, state.aux, 1.0 / self.num_micro_batches)
        return outgoing

    def run(self, edge: Tensor | None, batch: Batch) -> State:
        """The state after the last layer of this stage, from the incoming edge and the micro-batch."""
        state = State() if self.previous is None else self._unpack(self.previous, edge)
        for spec, layer in zip(self.specs, self._layers, strict=True):
            if spec.kind in RECOMPUTED[self.recompute] and torch.is_grad_enabled():
                state = _run_recomputed(layer, state, batch)
            else:
                state = layer(state, batch)
        state.join_latents()
        return state

    def pack(self, state: State) -> Tensor:
        """The outgoing edge, in the dtype of the parameters."""
        return pack(state, next(self.parameters()).dtype)

    def _unpack(self, previous: LayerSpec, edge: Tensor | None) -> State:
        assert edge is not None
        config = self._config
        return unpack(
            edge,
            flow=previous.in_flow,
            width=config.decoder.width,
            num_tokens=config.image.num_tokens,
            soft_dim=config.gmm.soft_dim,
        )


class StatsSink:
    """Adds up the metric sums of the micro-batches of a step, on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, sums: Tensor | None) -> None:
        """One micro-batch's [2, metrics] sums and counts."""
        if sums is not None:
            self._sums = sums.detach().clone() if self._sums is None else self._sums + sums.detach()

    def take(self, device: torch.device) -> Tensor:
        """fp64 [2, metrics] of the step, and starts again from zero."""
        sums, self._sums = self._sums, None
        return torch.zeros(2, len(METRICS), dtype=torch.float64, device=device) if sums is None else sums.to(device)


def _run_recomputed(layer: nn.Module, state: State, batch: Batch) -> State:
    """One layer under non-reentrant checkpointing.

    Layers may change their state in place, so the recomputation must start from the tensors, not from the state object. Images
    without gradient go through once: the recomputation leaves them out, and nothing keeps them for it.
    """
    context, latents = state.context, state.latents or Latents(())
    frozen, reader = latents.frozen, latents.reader

    def run(x: Tensor | None, hidden: Tensor | None, soft: Tensor | None, *trained: Tensor) -> State:
        nonlocal frozen
        inside, frozen = Latents(trained, frozen, reader) if trained else None, None
        out: State = layer(State(x=x, latents=inside, hidden=hidden, soft=soft, context=context), batch)
        return out

    # The streams are functions of (seed, position): there is no generator state to save and restore.
    out = checkpoint(run, state.x, state.hidden, state.soft, *latents.trained, use_reentrant=False, preserve_rng_state=False)
    state.x, state.latents, state.hidden, state.soft, state.context = out.x, out.latents, out.hidden, out.soft, out.context
    state.loss = out.loss if out.loss is not None else state.loss
    if out.aux is not None:
        state.add_aux(out.aux)
    if out.stats is not None:
        state.stats = out.stats if state.stats is None else state.stats + out.stats
    return state


def _add_under_name(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Registers `layer` so that its parameters are called `name.<local>`; dots become nested containers."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(leaf, layer)


def as_jetformer(stage: PipelineStage, config: JetFormerConfig) -> JetFormer:
    """The whole model around the layers of a stage that has all of them, sharing its weights: for sampling while training."""
    assert stage.previous is None
    assert stage.is_last
    model = JetFormer(config)
    for name, child in stage.named_children():
        setattr(model, name, nn.ModuleList(child.children()) if name in ("couplings", "blocks") else child)
    return model
