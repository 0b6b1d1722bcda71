"""Groups of equal values, against a dictionary."""

import numpy as np

from data_prep.dedup.exact import groups_of_digests, groups_of_hashes


def reference(values: list[object], ids: list[int]) -> set[tuple[int, int]]:
    first: dict[object, int] = {}
    for identity, value in sorted(zip(ids, values, strict=True)):
        first.setdefault(value, identity)
    return {(identity, first[value]) for value, identity in zip(values, ids, strict=True) if identity >= 0 and identity != first[value]}


def shuffled_ids(count: int, generator: np.random.Generator) -> np.ndarray:
    """Some of them of published samples."""
    return generator.permutation(count) - count // 5


def test_groups_of_hashes_are_those_of_a_dictionary() -> None:
    generator = np.random.default_rng(0)
    values, ids = generator.integers(0, 300, 1000).astype(np.uint64), shuffled_ids(1000, generator)
    members = groups_of_hashes(values, ids)
    assert set(members.tolist()) == reference(values.tolist(), ids.tolist())
    assert len(members) == len(set(members.tolist()))


def test_digests_that_share_their_first_bytes_stay_apart() -> None:
    generator = np.random.default_rng(1)
    digests = np.zeros((600, 32), np.uint8)
    digests[:, 0] = generator.integers(0, 40, 600)
    digests[:, 31] = generator.integers(0, 5, 600)
    ids = shuffled_ids(600, generator)
    members = groups_of_digests(digests, ids)
    assert set(members.tolist()) == reference([row.tobytes() for row in digests], ids.tolist())


def test_a_million_copies_are_one_group() -> None:
    members = groups_of_hashes(np.full(1_000_000, 7, np.uint64), np.arange(1_000_000))
    assert len(members) == 999_999
    assert (members["group"] == 0).all()


def test_no_samples_make_no_groups() -> None:
    assert len(groups_of_hashes(np.zeros(0, np.uint64), np.zeros(0, np.int64))) == 0
    assert len(groups_of_digests(np.zeros((0, 32), np.uint8), np.zeros(0, np.int64))) == 0
