"""The last steps: one greedy pass over groups and edges, then a file of verdicts for every part."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from configs.errors import UserError
from data_prep.dedup.caption import NUM_PERMUTATIONS, similarity
from data_prep.dedup.evaluation import item_names
from data_prep.dedup.gather import DUPLICATE, EVAL_CAPTION, EVAL_IMAGE, NEAR_CAPTION, NEAR_IMAGE
from data_prep.dedup.greedy import Relation, decide
from data_prep.dedup.pairs import sorted_unique
from data_prep.dedup.store import DECISION, EDGE, MEMBER, joined, key_of, path_of, read_all, records
from data_prep.storage import Storage, open_storage

REASONS = {
    EVAL_IMAGE: "eval_image",
    EVAL_CAPTION: "eval_caption",
    DUPLICATE: "duplicate",
    NEAR_IMAGE: "near_duplicate_image",
    NEAR_CAPTION: "near_duplicate_caption",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationFiles:
    """What the searches stored about one relation."""

    code: int
    group_searches: tuple[int, ...]
    """Numbers of the searches for its groups."""
    edge_searches: tuple[int, ...] = ()
    """Numbers of the searches for pairs of its groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyTask:
    """The greedy pass over everything."""

    relations: tuple[RelationFiles, ...]
    """The most telling first."""
    windows: range
    window_size: int


def decide_all(url: str, task: GreedyTask) -> dict[str, int]:
    """Decides who stays, a window of ids after the other; stores the dropped below `parts/dedup/decisions/`.

    Returns:
        `dropped`: how many.
    """
    storage = open_storage(url)
    relations = [_relation(storage, files) for files in task.relations]
    dropped = 0
    for window in task.windows:
        ids, groups = _involved(storage, task, relations, window)
        found = decide(relations, ids, groups)
        storage.put_bytes(path_of("decisions", f"{window:06d}"), found.tobytes())
        dropped += len(found)
    return {"dropped": dropped}


def write_verdicts(url: str, number: int, names: Sequence[str], window_size: int, has_decisions: bool) -> dict[str, dict[str, int]]:
    """Writes the verdicts of the parts of one gather task; returns, by part, the samples dropped for each reason."""
    storage = open_storage(url)
    with np.load(io.BytesIO(storage.read_bytes(path_of("gather", f"{number:06d}.rows.npz")))) as arrays:
        ids, offsets, found = arrays["ids"], arrays["offsets"], arrays["found"]
    dropped = records(DECISION, id=found["row"], other=found["item"], code=found["code"], measure=found["measure"])
    items = item_names(storage) if len(found) else []
    left = np.delete(ids, found["row"])
    if has_decisions and len(left):
        decisions = _decisions_on(storage, left, window_size)
        order = np.argsort(ids)
        place = np.minimum(np.searchsorted(ids[order], decisions["id"]), len(ids) - 1)
        decisions = decisions[ids[order][place] == decisions["id"]]
        decisions["id"] = order[np.searchsorted(ids[order], decisions["id"])]
        dropped = np.concatenate([dropped, decisions])
    dropped = dropped[np.argsort(dropped["id"])]  # from here on `id` is the row
    counts = {}
    edges = np.searchsorted(dropped["id"], offsets)
    for part, name in enumerate(names):
        ours = dropped[edges[part] : edges[part + 1]]
        reasons = [REASONS[code] for code in ours["code"].tolist()]
        details = list(map(partial(_detail, items), ours.tolist()))
        _store_verdicts(storage, name, int(offsets[part + 1] - offsets[part]), (ours["id"] - offsets[part], reasons, details))
        counts[name] = dict(sorted(Counter(reasons).items()))
    return counts


def verdicts(storage: Storage, part: str) -> tuple[np.ndarray, list[tuple[int, str, str]]]:
    """What was decided about a part.

    Returns:
        Which of its rows are kept, bool [N]; and (row, reason, detail) of the others, by row.

    Raises:
        UserError: `find_duplicates` has not finished this part.
    """
    import pyarrow.parquet as pq

    path = path_of("verdicts", f"{part}.parquet")
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(path)))
    except FileNotFoundError:
        raise UserError(f"{storage.url}/{path} is missing", fix="run the same command again") from None
    kept = np.ones(int(table.schema.metadata[b"num_rows"]), bool)
    kept[table["row"].to_numpy()] = False
    return kept, list(zip(*(table[name].to_pylist() for name in ("row", "reason", "detail")), strict=True))


def _relation(storage: Storage, files: RelationFiles) -> Relation:
    groups = [np.frombuffer(storage.read_bytes(path_of("search", f"{number:06d}.groups")), "<i8") for number in files.group_searches]
    edges = [np.frombuffer(storage.read_bytes(path_of("search", f"{number:06d}.edges")), EDGE) for number in files.edge_searches]
    own_measure = NUM_PERMUTATIONS if files.code == NEAR_CAPTION else 0
    return Relation(files.code, joined(groups, np.dtype("<i8")), joined(edges, EDGE), own_measure)


def _involved(storage: Storage, task: GreedyTask, relations: Sequence[Relation], window: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(samples of a window that anything is like, int64 [N]; for each relation the position of their group, int64 [N])."""
    place = window - task.windows.start
    low, high = window * task.window_size, (window + 1) * task.window_size
    members = []
    for files in task.relations:
        paths = [path_of("search", f"{number:06d}.members") for number in files.group_searches]
        members.append(read_all(storage, paths, MEMBER, range(place, place + 1), len(task.windows)))
    firsts = [relation.groups[np.searchsorted(relation.groups, low) : np.searchsorted(relation.groups, high)] for relation in relations]
    ids = sorted_unique(np.concatenate([*firsts, *(found["id"] for found in members)]))
    groups = []
    for relation, found in zip(relations, members, strict=True):
        group = ids.copy()
        group[np.searchsorted(ids, found["id"])] = found["group"]
        groups.append(relation.index_of(group))
    return ids, groups


def _decisions_on(storage: Storage, ids: np.ndarray, window_size: int) -> np.ndarray:
    """Decisions of the windows that hold these ids."""

    def read() -> Iterator[np.ndarray]:
        for window in np.unique(ids // window_size).tolist():
            yield np.frombuffer(storage.read_bytes(path_of("decisions", f"{window:06d}")), DECISION)

    return joined(list(read()), DECISION)


def _detail(items: Sequence[str], dropped: tuple[int, int, int, int]) -> str:
    """Names the other sample or evaluation item, and how close it is."""
    _, other, code, measure = dropped
    name = items[other] if code in (EVAL_IMAGE, EVAL_CAPTION) else key_of(other)
    if code == DUPLICATE:
        return name
    return f"{name}, {measure} bits apart" if code in (EVAL_IMAGE, NEAR_IMAGE) else f"{name}, similarity {float(similarity(measure)):.2f}"


def _store_verdicts(storage: Storage, part: str, num_rows: int, columns: tuple[np.ndarray, list[str], list[str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"row": pa.int32(), "reason": pa.string(), "detail": pa.string()}, metadata={"num_rows": str(num_rows)})
    rows, reasons, details = columns
    buffer = io.BytesIO()
    pq.write_table(pa.table([pa.array(rows, pa.int32()), reasons, details], schema=schema), buffer)
    storage.put_bytes(path_of("verdicts", f"{part}.parquet"), buffer.getvalue())
