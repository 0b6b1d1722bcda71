"""What the blocks of one forward pass share on one pipeline stage, made once by the first of them.

Letters: B examples, S positions, D width, L blocks of the whole decoder.
"""

from dataclasses import dataclass

from torch import Tensor

from model import sequence, streams
from model.batch import Batch
from model.config import JetFormerConfig
from model.decoder.attention import AttentionContext
from model.kernels.splitmix import DropoutKey
from model.streams import Stream


@dataclass(slots=True)
class DecoderContext:
    """Functions of the batch alone: no gradient flows into them."""

    attention: AttentionContext
    dropout_keys: Tensor | None
    """int64 [2L, B]: two branches per block; None where nothing is dropped."""
    dropout_probability: float

    @staticmethod
    def build(batch: Batch, x: Tensor, config: JetFormerConfig) -> "DecoderContext":
        """For decoder inputs x [B, S, D]."""
        mask = sequence.key_mask(batch, config)
        attention = AttentionContext.build(sequence.rope_positions(mask, x.shape[1], x.device), mask, config.decoder)
        probability, keys = config.decoder.dropout, None
        if batch.noise.train and probability > 0:
            keys = streams.substream_keys(batch.noise.seed, Stream.DROPOUT, batch.positions, 2 * config.decoder.depth)
        return DecoderContext(attention, keys, probability)

    def dropout(self, block: int, branch: int) -> DropoutKey | None:
        """What block `block` drops of its branch 0 (attention) or 1 (MLP): alike on every tensor-parallel rank, whatever the layout."""
        return None if self.dropout_keys is None else DropoutKey(self.dropout_keys[2 * block + branch], self.dropout_probability)
