"""Caption and soft tokens as one sequence (spec 1.5), and where in it each head reads.

Letters: B examples, T text slots, R prefix repeats, I image tokens, S = R*T + I + 1 positions, D width, d soft channels, V vocabulary.

    text first:   BOS, t1..tT, BOI, s1..sI   without its last token; text is predicted from [0, T), the image from [S-I, S)
    image first:  BOI, s1..sI, BOS, t1..tT   without its last token; the image is predicted from [0, I), text from [I+1, S)
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import stats, streams
from model.batch import Batch
from model.config import JetFormerConfig
from model.flow.rows import FlowRows, gather_index
from model.parallel import Dense, TensorParallel, gather_rows, sharded_parameter, sum_over_ranks
from model.state import State
from model.streams import Stream

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class TextEmbedding(nn.Module):
    """Embedding table, its rows split over the tensor-parallel ranks. Weight [V * R, D]."""

    def __init__(self, num_rows: int, width: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.first_row = tp.bounds(num_rows)[0]
        self.weight = sharded_parameter((num_rows, width), tp)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        if self.tp.size == 1:
            return functional.embedding(ids, self.weight)
        local = ids - self.first_row
        own = (local >= 0) & (local < len(self.weight))
        rows = functional.embedding(torch.where(own, local, 0), self.weight) * own.unsqueeze(-1).to(self.weight.dtype)
        return sum_over_ranks(rows, self.tp)


class SequenceEmbedding(nn.Module):
    """Latents -> soft tokens and factored-out rest; caption and soft tokens -> decoder inputs."""

    def __init__(self, config: JetFormerConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.config = config
        self.tp = tp
        text = config.text
        self.text = TextEmbedding(text.vocab_size * text.num_repeats, config.decoder.width, tp)
        self.image = Dense(config.gmm.soft_dim, config.decoder.width)

    def forward(self, state: State, batch: Batch) -> State:
        """state.x or state.latents -> state.hidden [B, S, D] and state.soft [B, I, d]; scores the factored-out dims."""
        soft_dim, frozen = self.config.gmm.soft_dim, None
        if state.latents is None:
            assert state.x is not None
            z = state.x
        else:
            assert state.latents.reader is None
            z, frozen = state.latents.trained[0], state.latents.frozen
        soft, rest = z.split([soft_dim, z.shape[-1] - soft_dim], dim=-1)
        if frozen is not None:  # of images without gradient nothing but the soft tokens is needed
            soft = torch.cat([soft, frozen[0][..., :soft_dim]])
        result = State(aux=state.aux, stats=state.stats, outputs=state.outputs)
        if batch.score_all:
            result.record("z", z if frozen is None else torch.cat([z, frozen[0]]))
        self._score_rest(result, batch, rest)
        index, max_rows = gather_index(batch, self.config, self.tp)
        soft = gather_rows(soft, index.to(soft.device, non_blocking=True), max_rows, self.tp)
        result.soft = self._add_input_noise(self._stop_gradient(soft, batch), batch)
        result.hidden = self.embed(batch, result.soft)
        return result

    def embed(self, batch: Batch, soft: Tensor) -> Tensor:
        """Decoder inputs [B, S, D] from the caption of `batch` and soft tokens [B, I, d]."""
        text, image = self.embed_text(batch.text, batch.drop_prefix), self.image(soft)
        bos, boi = self.embed_markers(len(batch), text.device)
        num_first = batch.num_text_first
        text_first = [part[:num_first] for part in (bos, text, boi, image)]
        image_first = [part[num_first:] for part in (boi, image, bos, text)]
        return torch.cat([torch.cat(text_first, dim=1), torch.cat(image_first, dim=1)])[:, :-1]

    def embed_text(self, text: Tensor, drop: Tensor) -> Tensor:
        """int64 [B, T] -> [B, R*T, D]; the rows of dropped examples become NOLABEL. Copy i has a table of its own."""
        config = self.config.text
        ids = torch.where(drop[:, None], config.nolabel_id, text)
        offsets = torch.arange(config.num_repeats, device=text.device) * config.vocab_size
        return self.text((ids[:, None, :] + offsets[:, None]).flatten(1))

    def embed_markers(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """BOS and BOI, [B, 1, D] each."""
        config = self.config.text
        ids = torch.full((batch_size, 2), config.bos_id, device=device)  # filled there: a copy from the host would wait for the device
        ids[:, 1] = config.boi_id
        bos, boi = self.text(ids).chunk(2, dim=1)
        return bos, boi

    def _stop_gradient(self, soft: Tensor, batch: Batch) -> Tensor:
        """Captioning does not train the flow (spec 1.4). Frozen rows come detached already."""
        if not self.config.objective.stop_grad_flow_on_image_prefix or batch.num_text_first == len(batch):
            return soft
        return torch.cat([soft[: batch.num_text_first], soft[batch.num_text_first :].detach()])

    def _add_input_noise(self, soft: Tensor, batch: Batch) -> Tensor:
        """Text-first soft tokens get noise of a random std, as input and as target (spec 1.4)."""
        if batch.input_noise is not None:
            return soft + batch.input_noise
        noise, max_std = batch.noise, self.config.objective.input_noise_max_std
        if not noise.train or max_std == 0:
            return soft
        std = streams.uniform(noise.seed, Stream.INPUT_NOISE_STD, batch.positions, (1, 1)) * max_std
        std = std * batch.text_first.view(-1, 1, 1)
        return soft + std * streams.normal(noise.seed, Stream.INPUT_NOISE, batch.positions, soft.shape[1:])

    def _score_rest(self, state: State, batch: Batch, rest: Tensor) -> None:
        """Adds -log N(rest; 0, 1) of the factored-out dims to the loss (spec 1.8)."""
        rows = FlowRows.of(batch, self.config, self.tp)
        nats = (0.5 * rest[: rows.num_trained] ** 2 + HALF_LOG_2PI).flatten(1).sum(1)
        scored = rows.scored(nats)
        bits_per_nat = 1 / (self.config.image.num_subpixels * math.log(2))
        state.add_aux(scored.sum() * (bits_per_nat / len(batch)))
        if batch.score_all:
            state.record("rest_nll", nats)
        if batch.log_stats and not rows.placeholder:
            stats.add(state, "loss", scored.sum() * bits_per_nat, count=0)
            stats.add(state, "image_bits", nats[: rows.num_text_first].sum() * bits_per_nat, count=0)
            if batch.scores_prefix(self.config.objective):
                stats.add(state, "image_bits_unconditional", nats[rows.num_text_first :].sum() * bits_per_nat, count=0)
            stats.add(state, "rest_nats_per_dim", scored.sum(), count=rows.num_scored * rest[0].numel())


def key_mask(batch: Batch, config: JetFormerConfig) -> Tensor | None:
    """bool [B, S], True where attention may look; None where it may look everywhere."""
    if not batch.padded:
        return None
    # A dropped prefix is attended whole (spec 1.5).
    text = (batch.text_mask | batch.drop_prefix[:, None]).repeat(1, config.text.num_repeats)
    one = torch.ones(len(batch), 1, dtype=torch.bool, device=text.device)
    image = one.expand(-1, config.image.num_tokens)
    first, num_first = torch.cat([one, text, one, image], dim=1), batch.num_text_first
    second = torch.cat([one, image, one, text], dim=1)
    return torch.cat([first[:num_first], second[num_first:]])[:, :-1]


def rope_positions(mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """int64 [B or 1, S]: how many attended tokens came before; pads do not advance it (spec 1.5)."""
    if mask is None:
        return torch.arange(length, device=device)[None]
    return torch.cumsum(mask.long(), dim=1) - 1


def image_slice(config: JetFormerConfig, *, text_first: bool) -> slice:
    """Decoder positions from which the I image tokens are predicted."""
    start = config.text.length * config.text.num_repeats + 1 if text_first else 0
    return slice(start, start + config.image.num_tokens)


def text_slice(config: JetFormerConfig, *, text_first: bool) -> slice:
    """Decoder positions from which the T text slots are predicted."""
    start = 0 if text_first else config.image.num_tokens + 1
    return slice(start, start + config.text.length)
