"""Captions and labels as token rows, and back (spec 1.1, 1.5). T = text slots of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece

from configs.errors import UserError
from model.config import TextConfig
from pipeline.data.dataset import Dataset


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token rows of N texts."""

    ids: npt.NDArray[np.int64]
    """[N, T]"""
    mask: npt.NDArray[np.bool_]
    """[N, T], True where attention may look."""
    loss: npt.NDArray[np.bool_]
    """[N, T], True where the text is scored."""
    cut: npt.NDArray[np.bool_]
    """[N], True where the caption was longer than the slots."""


class TextCodec(Protocol):
    """What stands in the text slots."""

    def encode(self, texts: Sequence[str]) -> EncodedText:
        """Texts to token rows."""

    def decode(self, ids: Sequence[int]) -> str:
        """One token row to text."""


class CaptionCodec:
    """Captions by SentencePiece: lower-cased, EOS appended, cut and padded to the model's text slots.

    A caption that is too long keeps its EOS and loses its last pieces; the reference cuts the EOS off as well. Otherwise
    as the reference does it: with `ignore_pad` off, unused slots are read and scored like any other; with it on, they are
    masked out and not scored, and the EOS is scored but masked out, because there it stands for the begin of the image.
    """

    def __init__(self, config: TextConfig, tokenizer: bytes) -> None:
        """
        Args:
            tokenizer: content of a SentencePiece model file

        Raises:
            UserError: not such a file, or not the vocabulary that the model was made for.
        """
        self.config = config
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        except (RuntimeError, ValueError) as error:
            raise UserError("the tokenizer does not load", got=error, expected="a SentencePiece model file") from None
        pieces, eos = self._processor.get_piece_size(), self._processor.eos_id()
        if pieces != config.num_pieces:
            raise UserError(
                "the tokenizer is not the model's",
                got=f"{pieces} pieces",
                expected=f"model.text.num_pieces={config.num_pieces}",
                fix=f"set model.text.num_pieces={pieces} for a new model; a trained one needs its own tokenizer",
            )
        if eos != config.eos_id:
            raise UserError(
                "the tokenizer ends texts with another piece than the model",
                got=f"EOS {eos}",
                expected=f"model.text.eos_id={config.eos_id}",
                fix=f"set model.text.eos_id={eos}, or train the tokenizer with eos_id={config.eos_id}",
            )

    def encode(self, texts: Sequence[str]) -> EncodedText:
        """Captions to token rows."""
        length, config = self.config.length, self.config
        pieces = self._processor.encode([text.lower() for text in texts], out_type=int, num_threads=1)
        ids = np.full((len(texts), length), config.pad_id, dtype=np.int64)
        lengths = np.array([min(len(row), length - 1) for row in pieces], dtype=np.int64)
        for row, (target, used) in enumerate(zip(ids, lengths, strict=True)):
            target[:used] = pieces[row][:used]
            target[used] = config.eos_id
        cut = np.array([len(row) > length - 1 for row in pieces], dtype=bool)
        if not config.ignore_pad:
            everywhere = np.ones_like(ids, dtype=bool)
            return EncodedText(ids, everywhere, everywhere.copy(), cut)
        slots = np.arange(length)
        return EncodedText(ids, slots < lengths[:, None], slots <= lengths[:, None], cut)

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first EOS; ids that are no piece (the model's own markers) are passed over."""
        pieces: list[int] = []
        for value in ids:
            if value == self.config.eos_id:
                break
            if 0 <= value < self.config.num_pieces:
                pieces.append(int(value))
        return str(self._processor.decode(pieces))


class LabelCodec:
    """Class labels in decimal: one slot each, always read and scored; the model repeats it (`text.num_repeats`)."""

    def __init__(self, config: TextConfig) -> None:
        """Raises:
        UserError: the model has more than one text slot.
        """
        if config.length != 1:
            raise UserError("a label takes one text slot", got=f"model.text.length={config.length}", expected=1, fix="set model.text.length=1")
        self.config = config

    def encode(self, texts: Sequence[str]) -> EncodedText:
        """Labels to token rows.

        Raises:
            UserError: not an integer, or not a class of the model.
        """
        ids = np.array([[self._parse(text)] for text in texts], dtype=np.int64).reshape(len(texts), 1)
        return EncodedText(ids, np.ones_like(ids, dtype=bool), np.ones_like(ids, dtype=bool), np.zeros(len(texts), dtype=bool))

    def decode(self, ids: Sequence[int]) -> str:
        """The label in decimal."""
        return str(int(ids[0]))

    def _parse(self, text: str) -> int:
        stripped = text.strip()
        if not stripped.isdecimal() or int(stripped) >= self.config.num_pieces:
            raise UserError(
                "not a class of the model",
                got=repr(text),
                expected=f"an integer from 0 to {self.config.num_pieces - 1} (model.text.num_pieces classes)",
                fix="set model.text.num_pieces to the number of classes",
            )
        return int(stripped)


def build_codec(config: TextConfig, *, labels: bool, tokenizer: bytes | None) -> TextCodec:
    """The codec of a model: labels, or captions by the given SentencePiece model file."""
    if labels:
        return LabelCodec(config)
    if tokenizer is None:
        raise ValueError("captions need a tokenizer")
    return CaptionCodec(config, tokenizer)


def dataset_codec(config: TextConfig, dataset: Dataset, *, labels: bool) -> TextCodec:
    """The codec of a model trained on this data set, after checking that their tokenizers agree (see `Dataset.read_tokenizer`)."""
    return build_codec(config, labels=labels, tokenizer=None if labels else dataset.read_tokenizer())
