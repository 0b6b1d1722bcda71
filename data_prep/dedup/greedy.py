"""Who stays: samples are considered in the order of their numbers, and one is dropped if it is close to an earlier one *that stays*.

So in a chain A ~ B ~ C, where A and C are not alike, only B goes. Published samples have been decided before (their ids are negative) and
stay. A sample belongs to at most one group per relation, and groups are what is close to each other, so that at most one sample of a group
stays and the whole pass takes time linear in samples and edges.
"""

from collections.abc import Sequence

import numpy as np

from data_prep.dedup.pairs import positions, sorted_unique
from data_prep.dedup.store import DECISION, records

NOBODY = np.iinfo(np.int64).max


class Relation:
    """One kind of likeness: groups, which of them are close, and who has taken each.

    A group is *taken* by the first kept sample that is in it or in a group close to it; nobody else of it can stay.
    """

    def __init__(self, code: int, groups: np.ndarray, edges: np.ndarray, own_measure: int = 0) -> None:
        """
        Args:
            code: reported with every sample that is dropped for this relation.
            groups: numbers of groups that have members besides their first, int64 [G], any order, may repeat.
            edges: `EDGE` records between group numbers, each pair once or more often; no edge between two published samples.
            own_measure: the measure of two samples of one group.
        """
        self.code = code
        self.groups = sorted_unique(np.concatenate([groups, edges["later"], edges["earlier"]]))
        self.taker = np.full(len(self.groups), NOBODY, np.int64)
        self.measure = np.full(len(self.groups), own_measure, np.uint8)
        published = self.groups < 0
        self.taker[published] = self.groups[published]
        later, earlier = (positions(self.groups, edges[name]).astype(np.int32) for name in ("later", "earlier"))
        by_published = edges["earlier"] < 0
        self._take(later[by_published], edges["earlier"][by_published], edges["measure"][by_published])
        self._link(later[~by_published], earlier[~by_published], edges["measure"][~by_published])

    def index_of(self, group_numbers: np.ndarray) -> np.ndarray:
        """Position of groups in `groups`, -1 for those that nothing is close to: int64 [N]."""
        if not len(self.groups):
            return np.full(len(group_numbers), -1)
        found = np.minimum(np.searchsorted(self.groups, group_numbers), len(self.groups) - 1)
        return np.where(self.groups[found] == group_numbers, found, -1)

    def _take(self, groups: np.ndarray, takers: np.ndarray, measures: np.ndarray) -> None:
        """Groups close to published samples, and without one themselves, are taken by the first of these."""
        order = np.lexsort((measures, takers, groups))
        first = order[np.unique(groups[order], return_index=True)[1]]
        self.taker[groups[first]] = takers[first]
        self.measure[groups[first]] = measures[first]

    def _link(self, later: np.ndarray, earlier: np.ndarray, measures: np.ndarray) -> None:
        """Neighbours of group g: `neighbours[starts[g]:starts[g + 1]]`, in no particular order, some perhaps twice."""
        source = np.concatenate([later, earlier])
        order = np.argsort(source, kind="stable")
        self.neighbours = np.concatenate([earlier, later])[order]
        self.link_measures = np.concatenate([measures, measures])[order]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=len(self.groups)))])


def decide(relations: Sequence[Relation], ids: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Considers samples in the order given; calls must follow each other in the order of ids.

    Args:
        relations: the most telling first: it is the one reported.
        ids: int64 [N], ascending, none negative.
        groups: of each relation, `Relation.index_of` the samples' groups: int64 [N].

    Returns:
        `DECISION` records of the dropped samples.
    """
    free = np.ones(len(ids), bool)
    for relation, group in zip(relations, groups, strict=True):
        free[group >= 0] &= relation.taker[group[group >= 0]] == NOBODY
    rows = np.flatnonzero(free)
    columns = [group[rows].tolist() for group in groups]
    _keep_first(relations, ids[rows].tolist(), columns)
    found = np.zeros(0, DECISION)
    open_rows = np.ones(len(ids), bool)
    for relation, group in zip(relations, groups, strict=True):
        # Taken by a smaller id: before this sample's turn. By its own: it stays. By a larger: it went for another relation.
        gone = np.flatnonzero(open_rows & (group >= 0))
        gone = gone[relation.taker[group[gone]] < ids[gone]]
        open_rows[gone] = False
        code = np.full(len(gone), relation.code)
        taken = group[gone]
        found = np.concatenate([found, records(DECISION, id=ids[gone], other=relation.taker[taken], code=code, measure=relation.measure[taken])])
    return found[np.argsort(found["id"], kind="stable")]


def _keep_first(relations: Sequence[Relation], ids: Sequence[int], columns: Sequence[Sequence[int]]) -> None:
    """Lets every sample whose groups are free take them, and what is close to them. Plain Python: each choice depends on the one before."""
    views = [
        (relation.taker.data, relation.measure.data, relation.starts.data, relation.neighbours, relation.link_measures) for relation in relations
    ]
    for row, identity in enumerate(ids):
        own = [column[row] for column in columns]
        if any(group >= 0 and view[0][group] != NOBODY for group, view in zip(own, views, strict=True)):
            continue
        for group, (taker, measure, starts, neighbours, measures) in zip(own, views, strict=True):
            if group < 0:
                continue
            taker[group] = identity
            begin, end = starts[group], starts[group + 1]
            if begin == end:
                continue
            for other, closeness in zip(neighbours[begin:end].tolist(), measures[begin:end].tolist(), strict=True):
                if taker[other] == NOBODY:
                    taker[other] = identity
                    measure[other] = closeness
