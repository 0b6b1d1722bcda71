"""The greedy pass, against the rule applied to every pair."""

import numpy as np
import pytest

from data_prep.dedup.greedy import Relation, decide
from data_prep.dedup.store import EDGE, records
from tests.data_prep.dedup.planted import greedy_reference


def edges_of(pairs: list[tuple[int, int]]) -> np.ndarray:
    later, earlier = np.array([(max(pair), min(pair)) for pair in pairs], np.int64).reshape(-1, 2).T
    return records(EDGE, later=later, earlier=earlier, measure=np.full(len(later), 3))


def group_numbers(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Number of the group of every sample: the smallest id of those with its label."""
    return np.array([ids[labels == label].min() for label in labels])


def test_of_a_chain_only_every_second_goes() -> None:
    ids = np.arange(5)
    relation = Relation(1, np.zeros(0, np.int64), edges_of([(0, 1), (1, 2), (2, 3), (3, 4)]))
    dropped = decide([relation], ids, [relation.index_of(ids)])
    assert dropped[["id", "other", "code", "measure"]].tolist() == [(1, 0, 1, 3), (3, 2, 1, 3)]


def test_a_sample_close_to_one_that_went_for_another_reason_stays() -> None:
    ids = np.arange(3)
    images = Relation(1, np.zeros(0, np.int64), edges_of([(0, 1)]))
    captions = Relation(2, np.zeros(0, np.int64), edges_of([(1, 2)]))
    dropped = decide([images, captions], ids, [images.index_of(ids), captions.index_of(ids)])
    assert dropped["id"].tolist() == [1]


def test_of_several_likenesses_the_first_relation_is_reported() -> None:
    ids = np.arange(2)
    relations = [Relation(code, np.zeros(0, np.int64), edges_of([(0, 1)])) for code in (5, 4)]
    assert decide(relations, ids, [relation.index_of(ids) for relation in relations])["code"].tolist() == [5]


def test_a_later_sample_is_never_named_as_the_reason() -> None:
    """1 goes for its caption; 2, whose picture is like that of 1, stays; 1 must not be reported as a copy of 2."""
    ids = np.arange(3)
    images = Relation(1, np.zeros(0, np.int64), edges_of([(1, 2)]))
    captions = Relation(2, np.zeros(0, np.int64), edges_of([(0, 1)]))
    dropped = decide([images, captions], ids, [images.index_of(ids), captions.index_of(ids)])
    assert dropped[["id", "other", "code"]].tolist() == [(1, 0, 2)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("chunk", [1000, 17])
def test_verdicts_are_those_of_the_rule(seed: int, chunk: int) -> None:
    """Random groups and edges of three relations, some samples published."""
    generator = np.random.default_rng(seed)
    count, published = 150, 25
    ids = np.arange(count) - published
    labels = [generator.integers(0, most, count) for most in (400, 120, 200)]
    groups = [group_numbers(label, ids) for label in labels]
    links: list[set[tuple[int, int]]] = [set(), set(), set()]
    for link, group in zip(links[1:], groups[1:], strict=True):
        for _ in range(90):
            one, other = sorted(generator.choice(np.unique(group), 2, replace=False).tolist())
            if other >= 0:
                link.add((one, other))

    def is_close(one: int, other: int) -> bool:
        pairs = [(int(group[one + published]), int(group[other + published])) for group in groups]
        return any(a == b or (min(a, b), max(a, b)) in link for (a, b), link in zip(pairs, links, strict=True))

    relations = []
    for code, (group, link) in enumerate(zip(groups, links, strict=True)):
        crowded = group[(group != ids) & (ids >= 0)]
        relations.append(Relation(code, crowded, edges_of(sorted(link) * 2)))
    dropped: list[int] = []
    for begin in range(published, count, chunk):
        rows = slice(begin, begin + chunk)
        found = decide(relations, ids[rows], [relation.index_of(group[rows]) for relation, group in zip(relations, groups, strict=True)])
        dropped += found["id"].tolist()
        assert all(is_close(one, other) and other < one for one, other in zip(found["id"].tolist(), found["other"].tolist(), strict=True))
    kept = greedy_reference(ids.tolist(), is_close, frozenset(range(-published, 0)))
    assert sorted(set(ids.tolist()) - set(kept)) == dropped
    assert dropped
