"""The last layer: final norm, both heads, and the training loss (spec 1.8).

Letters: B examples, T text slots, I image tokens, S sequence, D width, d soft channels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import stats
from model.batch import Batch
from model.config import JetFormerConfig
from model.decoder.norm import RmsNorm
from model.heads.gmm import GmmHead
from model.heads.text import TextHead, slot_weights
from model.kernels.config import KernelsConfig
from model.parallel import TensorParallel
from model.sequence import image_slice, text_slice
from model.state import State

GREY_LEVEL_BITS = math.log2(127.5)
"""log2 of the grey levels per unit of the flow's input: turns density per unit into bits per 8-bit subpixel."""


class Head(nn.Module):
    """Scores each image given what stands before it in bits per subpixel, each caption in nats per token, and mixes them.

    An example counts with the modality that comes last in it (`loss_on_prefix=False`), so each head runs on half of the
    rows; where a micro-batch has none, it runs on one row of weight zero, so that every parameter gets a gradient.
    """

    def __init__(self, config: JetFormerConfig, tp: TensorParallel, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        kernels = kernels or KernelsConfig()
        self.config = config
        self.tp = tp
        width = config.decoder.width
        self.norm = RmsNorm(width, impl=kernels.rms_norm)
        self.gmm = GmmHead(config, tp, kernels)
        self.text = None if config.text.tie_logits else TextHead(width, config.text.vocab_size, tp, kernels)

    def forward(self, state: State, batch: Batch) -> State:
        """Sets state.loss, the mean over the micro-batch of the terms that are not in state.aux."""
        assert state.hidden is not None
        assert state.soft is not None
        result = State(hidden=self.norm(state.hidden), soft=state.soft, aux=state.aux, stats=state.stats, outputs=state.outputs)
        image_share, text_share = self._shares(batch)
        image_loss, image_bits = self._image_loss(result, batch, image_share)
        text_loss, text_nats = self._text_loss(result, batch, text_share)
        result.loss = image_loss + text_loss
        if batch.score_all:
            result.record("text_nats", text_nats)
        if batch.log_stats:
            terms = torch.where(image_share > 0, image_share * image_bits, 0) + torch.where(text_share > 0, text_share * text_nats, 0)
            self._record_losses(result, batch, terms * len(batch), image_bits, text_nats)
        return result

    def _shares(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What one bit per subpixel of each image, and one nat per token of each caption, adds to the loss: fp32 [B] each.

        Known before the heads run, which spares them a second pass (model.kernels.weighted_loss).
        """
        objective, text_first = self.config.objective, batch.text_first.float()
        if objective.loss_on_prefix:
            image, text = torch.ones_like(text_first), ~batch.drop_prefix / max(batch.valid_text_fraction, 1e-9)
        else:
            image, text = text_first, 1 - text_first
        return image / len(batch), text * (objective.text_loss_weight / len(batch))

    def _rows(self, batch: Batch, *, text_first: bool) -> slice:
        """The rows that a head scores: those in which its modality comes last, or all; never none."""
        size, boundary = len(batch), batch.num_text_first
        if batch.scores_prefix(self.config.objective):
            return slice(0, size)
        return slice(0, max(boundary, 1)) if text_first else slice(min(boundary, size - 1), size)

    def _predicting(self, hidden: Tensor, rows: slice, batch: Batch, *, image: bool) -> Tensor:
        """The positions of `rows` from which one modality is predicted: [n, I or T, D]."""
        pick = image_slice if image else text_slice
        boundary = min(max(batch.num_text_first, rows.start), rows.stop)
        text_first = hidden[rows.start : boundary, pick(self.config, text_first=True)]
        image_first = hidden[boundary : rows.stop, pick(self.config, text_first=False)]
        return torch.cat([text_first, image_first])

    def _image_loss(self, state: State, batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture part of the loss, and of each image in bits per subpixel, [B], zero where not scored; the constant is in both."""
        assert state.hidden is not None
        assert state.soft is not None
        rows = self._rows(batch, text_first=True)
        hidden = self._predicting(state.hidden, rows, batch, image=True)
        to_bits = 1 / (self.config.image.num_subpixels * math.log(2))
        weight = (share[rows] * to_bits).unsqueeze(1).expand(hidden.shape[:2])
        loss, nll = self.gmm.loss(hidden, state.soft[rows], weight)
        if batch.score_all:
            state.record("soft_nll", nll)
        if batch.log_stats:
            scored = slice(0, batch.num_text_first)
            components = self.gmm.effective_components(hidden[scored])
            self._record(state, "effective_components", components)
            self._record(state, "soft_nats_per_dim", nll[scored] / state.soft.shape[-1])
        bits = nll.sum(1) * to_bits + GREY_LEVEL_BITS
        return loss + share.sum() * GREY_LEVEL_BITS, functional.pad(bits, (rows.start, len(batch) - rows.stop))

    def _text_loss(self, state: State, batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
        """The caption part of the loss, and of each caption in nats per token, [B], zero where not scored."""
        assert state.hidden is not None
        if self.text is None:
            # Tied logits have no parameters here, and the class-conditional reference leaves them out of the loss (spec 1.5).
            return torch.zeros((), device=state.hidden.device), torch.zeros(len(batch), device=state.hidden.device)
        rows = self._rows(batch, text_first=False)
        slots = slot_weights(batch.text_loss[rows])
        hidden = self._predicting(state.hidden, rows, batch, image=False)
        loss, nll = self.text.loss(hidden, batch.text[rows], share[rows, None] * slots)
        if batch.score_all:
            state.record("text_nll", nll)
        return loss, functional.pad((nll * slots).sum(-1), (rows.start, len(batch) - rows.stop))

    def _record_losses(self, state: State, batch: Batch, terms: Tensor, image_bits: Tensor, text_nats: Tensor) -> None:
        boundary = batch.num_text_first
        self._record(state, "loss", terms)
        self._record(state, "image_bits", image_bits[:boundary])
        if batch.scores_prefix(self.config.objective):
            self._record(state, "image_bits_unconditional", image_bits[boundary:])
        if self.text is not None:
            self._record(state, "text_nats", text_nats[boundary:])
            if batch.scores_prefix(self.config.objective):
                self._record(state, "text_nats_unconditional", text_nats[:boundary])

    def _record(self, state: State, name: str, values: Tensor) -> None:
        """Adds the mean of `values` to a metric, once per tensor-parallel group."""
        if self.tp.rank == 0:
            stats.add(state, name, values.sum(), count=values.numel())
