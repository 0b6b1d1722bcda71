"""Compact sets against Python's own."""

import pickle
from array import array

import numpy as np
import pytest

from data_prep.filters.sets import HashSet, NearSet, hash_of


def test_a_hash_set_holds_what_was_put_in_and_nothing_else() -> None:
    texts = [f"example{number}.org" for number in range(2000)]
    found = HashSet(hash_of(text) for text in texts * 2)
    assert len(found) == 2000
    assert all(text in found for text in texts)
    assert not any(f"other{number}.org" in found for number in range(2000))
    assert texts[0].encode() in found
    assert 7 not in found
    assert "" not in HashSet()


def test_a_hash_set_takes_eight_bytes_an_entry_and_can_be_pickled_without_a_copy() -> None:
    found = HashSet(array("Q", range(100_000)))
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(found, protocol=5, buffer_callback=buffers.append)
    assert len(head) < 1000
    assert sum(len(buffer.raw()) for buffer in buffers) == 800_000
    assert len(pickle.loads(head, buffers=buffers)) == 100_000


@pytest.mark.parametrize("distance", [0, 1, 4, 7, 16])
def test_the_nearest_hash_is_that_of_a_full_search(distance: int) -> None:
    generator = np.random.default_rng(distance)
    hashes = [int(value) for value in generator.integers(0, 2**64, 3000, dtype=np.uint64)]
    found = NearSet(hashes, distance)
    questions = [int(value) for value in generator.integers(0, 2**64, 20, dtype=np.uint64)]
    for value in hashes[:60]:
        flips = generator.choice(64, size=int(generator.integers(0, distance + 3)), replace=False)
        questions.append(value ^ sum(1 << int(bit) for bit in flips))
    hits = 0
    for value in questions:
        least = min((value ^ other).bit_count() for other in hashes)
        assert found.nearest(value) == (least if least <= distance else None)
        hits += least <= distance
    assert hits
    assert NearSet([], distance).nearest(5) is None
