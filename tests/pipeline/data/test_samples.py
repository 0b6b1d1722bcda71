"""A split that fits in memory is read once; a larger one is read each time; both give the same arrays."""

import numpy as np
import pytest

from model.config import TextConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.order import Located, SampleOrder
from pipeline.data.reader import SampleReader
from pipeline.data.samples import SampleSource
from pipeline.data.text import dataset_codec


@pytest.fixture
def open_source(intact, num_pieces, monkeypatch):
    """open_source(cache_bytes) -> (source, list that grows with every sample read from the shards)."""
    reads: list[tuple[int, int]] = []
    original = SampleReader.read

    def counted(self, shard, member, **options):
        reads.append((shard, member))
        return original(self, shard, member, **options)

    monkeypatch.setattr(SampleReader, "read", counted)

    def make(cache_bytes: int) -> tuple[SampleSource, list[tuple[int, int]]]:
        reads.clear()
        dataset, text = open_dataset(str(intact.path)), TextConfig(length=8, num_pieces=num_pieces)
        reader = SampleReader(dataset, dataset.split("train"))
        return SampleSource(reader, dataset_codec(text, dataset, labels=False), text, with_images=True, cache_bytes=cache_bytes), reads

    return make


def test_a_small_split_is_read_once_and_a_large_one_each_time(open_source):
    order = SampleOrder([7, 5, 9], seed=0, window=2)
    for cache_bytes, expected in ((1 << 20, 21), (1000, 63)):
        source, reads = open_source(cache_bytes)
        for start in range(0, 63, 7):
            source.fetch(order.locate(np.arange(start, start + 7)))
        assert len(reads) == expected


def test_cached_arrays_are_the_callers_own(open_source, intact):
    source, _ = open_source(1 << 20)
    place = Located(np.zeros(2, dtype=int), np.array([1, 1]), np.array([2, 2]))
    first = source.fetch(place)
    first.images[:] = 0
    first.text.ids[:] = 0
    again = source.fetch(place)
    for row in range(2):
        np.testing.assert_array_equal(again.images[row], intact.images["train-000001", 2])
    assert again.text.ids.any()


def test_a_repeated_sample_is_read_once_per_request(open_source):
    source, reads = open_source(0)
    samples = source.fetch(Located(np.zeros(5, dtype=int), np.array([2, 0, 2, 2, 0]), np.array([3, 1, 3, 4, 1])))
    assert sorted(reads) == [(0, 1), (2, 3), (2, 4)]
    assert (samples.images[0] == samples.images[2]).all()
    assert (samples.images[1] == samples.images[4]).all()
    assert (samples.images[0] != samples.images[3]).any()
