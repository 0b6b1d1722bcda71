"""Encoded samples by (shard, member): from the shards, or from memory where the whole split is small."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.config import TextConfig
from pipeline.data.hashing import Int64Array
from pipeline.data.order import Located
from pipeline.data.reader import SampleReader
from pipeline.data.text import EncodedText, TextCodec

DEFAULT_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SampleArrays:
    """B samples, ready to become a batch. The arrays are the caller's own."""

    images: npt.NDArray[np.uint8] | None
    """[B, H, W, channels]"""
    text: EncodedText


class SampleSource:
    """Samples of one split as arrays.

    A split whose decoded samples fit in `cache_bytes` is kept in memory as it is read, and costs a gather from the second
    epoch on. A larger one is not cached at all: under a full shuffle a sample comes back an epoch later, when any
    smaller cache has long dropped it. (Pages of the table that no sample has touched take no memory.)
    """

    def __init__(
        self, reader: SampleReader, codec: TextCodec, config: TextConfig, *, with_images: bool, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.reader = reader
        self._codec = codec
        self._with_images = with_images
        counts = reader.split.counts
        self._firsts = np.concatenate([[0], np.cumsum(counts)])
        text_bytes = config.length * (8 + 1 + 1) + 2
        sample_bytes = text_bytes + (int(np.prod(reader.image_shape)) if with_images else 0)
        self._table = _Table(reader, config.length, with_images) if int(counts.sum()) * sample_bytes <= cache_bytes else None

    def fetch(self, located: Located, *, ahead: Sequence[int] = ()) -> SampleArrays:
        """The samples at these places, in the order asked.

        Args:
            ahead: shards that will be read next, in this order; fetched in the background where anything has to be read at all
        """
        if self._table is None:
            return self._read(located.shard, located.member, ahead)
        rows = self._firsts[located.shard] + located.member
        missing = np.unique(rows[~self._table.filled[rows]])
        if len(missing):
            shard = np.searchsorted(self._firsts, missing, side="right") - 1
            self._table.put(missing, self._read(shard, missing - self._firsts[shard], ahead))
        return self._table.get(rows)

    def close(self) -> None:
        """Closes the reader."""
        self.reader.close()

    def _read(self, shard: Int64Array, member: Int64Array, ahead: Sequence[int]) -> SampleArrays:
        self.reader.prefetch([*np.unique(shard).tolist(), *ahead])
        places = list(zip(shard.tolist(), member.tolist(), strict=True))
        # Read in file order: neighbours in a shard share pages, and a batch across two windows opens each shard once.
        samples = {place: self.reader.read(*place, with_image=self._with_images) for place in sorted(set(places))}
        text = self._codec.encode([samples[place].text for place in places])
        images = [image for place in places if (image := samples[place].image) is not None]
        return SampleArrays(np.stack(images) if self._with_images else None, text)


class _Table:
    """All samples of a split in memory, filled as they come."""

    def __init__(self, reader: SampleReader, length: int, with_images: bool) -> None:
        num = reader.split.num_samples
        self.filled = np.zeros(num, dtype=bool)
        self._images = np.empty((num, *reader.image_shape), dtype=np.uint8) if with_images else None
        self._ids = np.empty((num, length), dtype=np.int64)
        self._mask = np.empty((num, length), dtype=bool)
        self._loss = np.empty((num, length), dtype=bool)
        self._cut = np.empty(num, dtype=bool)

    def put(self, rows: Int64Array, samples: SampleArrays) -> None:
        if self._images is not None and samples.images is not None:
            self._images[rows] = samples.images
        self._ids[rows], self._mask[rows] = samples.text.ids, samples.text.mask
        self._loss[rows], self._cut[rows] = samples.text.loss, samples.text.cut
        self.filled[rows] = True

    def get(self, rows: Int64Array) -> SampleArrays:
        text = EncodedText(self._ids[rows], self._mask[rows], self._loss[rows], self._cut[rows])
        return SampleArrays(None if self._images is None else self._images[rows], text)
