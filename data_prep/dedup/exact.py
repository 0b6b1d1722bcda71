"""Groups of samples that share a value: the bytes of the image, its perceptual hash, or the normal form of the caption.

Groups come before all pairs: a million copies of one placeholder are one group, not half a billion pairs. The number of a group is the
smallest id in it.
"""

import numpy as np

from data_prep.dedup.pairs import starts_of
from data_prep.dedup.store import MEMBER, records


def groups_of_hashes(hashes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Members of groups of one hash: `MEMBER` [M] of hashes uint64 [N] and ids int64 [N].

    Left out are the first of each group (its id is the group's number) and published samples, which stay in any case.
    """
    order = np.lexsort((ids, hashes))
    starts = starts_of(hashes[order])
    return _members(ids[order], ids[order][starts])


def groups_of_digests(digests: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Members of groups of one digest: `MEMBER` [M] of digests uint8 [N, 32] and ids int64 [N]; see `groups_of_hashes`.

    Sorted by the first 8 bytes, which anybody can make collide, and verified on all 32.
    """
    prefix = np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
    order = np.lexsort((ids, prefix))
    starts = starts_of(prefix[order])
    ids, digests = ids[order], digests[order]
    groups = ids[starts]
    is_odd = (digests != digests[starts]).any(axis=1)
    for start in np.unique(starts[is_odd]):
        rows = np.flatnonzero(starts == start)
        firsts: dict[bytes, int] = {}
        for row in rows:
            groups[row] = firsts.setdefault(digests[row].tobytes(), int(ids[row]))
    return _members(ids, groups)


def _members(ids: np.ndarray, groups: np.ndarray) -> np.ndarray:
    wanted = (ids != groups) & (ids >= 0)
    return records(MEMBER, id=ids[wanted], group=groups[wanted])
