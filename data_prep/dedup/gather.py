"""The first step: about a million samples are read from their sidecars, compared with the evaluation sets, and what is left is laid out
for the searches.

What is close to an evaluation item is decided here and for good: such a sample is not kept, so nothing is dropped for its sake.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep import metadata
from data_prep.config import DedupConfig
from data_prep.dedup.caption import BUCKET_CAP, SKETCH_BYTES, Bands, agreement, choose_bands, minima_of, normalize, sketches_of, text_hashes
from data_prep.dedup.evaluation import Evaluation
from data_prep.dedup.image import is_telling, matches, shuffled_bits
from data_prep.dedup.pairs import colliding, mix
from data_prep.dedup.store import BAND, BASE, EXACT, HASH, NUM_BUCKETS, bucket_of, path_of, records, write_buckets
from data_prep.storage import Storage, open_storage

EVAL_IMAGE, EVAL_CAPTION, DUPLICATE, NEAR_IMAGE, NEAR_CAPTION = range(5)
"""Codes of the reasons."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherTask:
    """Some sidecars: parts, or published shards."""

    number: int
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    """Of the sidecars of published shards."""
    is_base: bool
    dedup: DedupConfig


@dataclass(slots=True, kw_only=True)
class Rows:
    """The columns of N samples. Only those that the configuration needs are filled."""

    ids: np.ndarray
    """int64 [N]."""
    offsets: np.ndarray
    """First row of every sidecar, and N."""
    sha256: np.ndarray
    """uint8 [N, 32]."""
    phash: np.ndarray
    """uint64 [N]."""
    captions: list[str]


@dataclass(slots=True, kw_only=True)
class Texts:
    """Normal forms of captions, each of the U different ones once."""

    hashes: np.ndarray
    """uint64 [U]."""
    of_row: np.ndarray
    """Which of them each of N samples has, -1 where there is no caption: int64 [N]."""
    sketches: np.ndarray
    """uint8 [U, SKETCH_BYTES]."""
    band_keys: list[np.ndarray]
    """Of every `Bands` asked for: uint64 [bands, U]."""


def needs_exact(dedup: DedupConfig) -> bool:
    """Whether equal bytes count: they also make pictures alike whose hash tells nothing."""
    return dedup.exact or dedup.image_distance is not None


def gather(url: str, task: GatherTask) -> dict[str, int]:
    """Reads the sidecars of a task and stores its samples below `parts/dedup/gather/`.

    Returns:
        `num` samples left to compare, `low` and `high`: their smallest and largest id.
    """
    storage, dedup = open_storage(url), task.dedup
    rows = _load(storage, task)
    verdicts = np.full(len(rows.ids), -1)
    compares_evaluation = bool(dedup.evaluation) and not task.is_base
    evaluation = Evaluation.load(storage) if compares_evaluation else None
    schemes = [choose_bands(value) for value in (dedup.caption_similarity, dedup.evaluation_caption_similarity if evaluation else None) if value]
    texts = _texts(rows.captions, schemes) if schemes else None
    if not task.is_base:
        found = _against_evaluation(rows, texts, evaluation, dedup) if evaluation is not None else _nothing()
        verdicts[found["row"]] = found["item"]
        _store_rows(storage, task.number, rows, found)
    left = verdicts < 0
    _store_columns(storage, task, rows, left)
    if texts is not None and dedup.caption_similarity is not None:
        _store_texts(storage, task.number, texts, rows.ids, left)
    ids = rows.ids[left]
    return {"num": len(ids), "low": int(ids.min(initial=BASE)), "high": int(ids.max(initial=-BASE))}


def _load(storage: Storage, task: GatherTask) -> Rows:
    import pyarrow as pa
    import pyarrow.compute as pc

    dedup = task.dedup
    wanted = {
        "key": True,
        "sha256": needs_exact(dedup) or bool(dedup.evaluation),
        "phash": dedup.image_distance is not None or bool(dedup.evaluation),
        "caption": dedup.caption_similarity is not None or (dedup.evaluation_caption_similarity is not None and bool(dedup.evaluation)),
    }
    columns = [name for name, is_wanted in wanted.items() if is_wanted]
    folder = "metadata" if task.is_base else "parts"
    tables = [
        metadata.load(storage, name, columns=columns, sha256=sha256, folder=folder) for name, sha256 in zip(task.names, task.sha256, strict=True)
    ]
    table = pa.concat_tables(tables).combine_chunks()
    num = len(table)
    ids = pc.cast(table["key"], pa.int64()).to_numpy()
    digests = b"".join(table["sha256"].to_pylist()) if wanted["sha256"] else b""
    return Rows(
        ids=ids - BASE if task.is_base else ids,
        offsets=np.cumsum([0, *(len(part) for part in tables)]),
        sha256=np.frombuffer(digests, np.uint8).reshape(-1, 32),
        phash=table["phash"].to_numpy() if wanted["phash"] else np.zeros(num, np.uint64),
        captions=table["caption"].to_pylist() if wanted["caption"] else [],
    )


def _texts(captions: Sequence[str], schemes: Sequence[Bands]) -> Texts:
    normal = normalize(captions)
    hashes, first, inverse = np.unique(text_hashes(normal), return_index=True, return_inverse=True)
    of_row = np.where(np.fromiter(map(bool, normal), bool, len(normal)), inverse.reshape(-1), -1)
    sketches = [np.zeros((0, SKETCH_BYTES), np.uint8)]
    keys: list[list[np.ndarray]] = [[np.zeros((scheme.num_bands, 0), np.uint64)] for scheme in schemes]
    for minima in minima_of([normal[row] for row in first]):
        sketches.append(sketches_of(minima))
        for scheme, found in zip(schemes, keys, strict=True):
            found.append(scheme.keys(minima))
    return Texts(hashes=hashes, of_row=of_row, sketches=np.concatenate(sketches), band_keys=[np.concatenate(found, axis=1) for found in keys])


_FOUND = np.dtype([("row", "<i8"), ("item", "<i8"), ("code", "u1"), ("measure", "u1")])


def _nothing() -> np.ndarray:
    return np.zeros(0, _FOUND)


def _against_evaluation(rows: Rows, texts: Texts | None, evaluation: Evaluation, dedup: DedupConfig) -> np.ndarray:
    """The samples that are close to an evaluation item, each with the closest of the most telling kind: `_FOUND` records."""
    found = [_same_bytes(rows, evaluation), _same_picture(rows, evaluation, dedup.evaluation_image_distance)]
    if texts is not None and dedup.evaluation_caption_similarity is not None:
        found.append(_same_caption(texts, evaluation, choose_bands(dedup.evaluation_caption_similarity)))
    joined = np.concatenate(found)
    closeness = np.where(joined["code"] == EVAL_CAPTION, 255 - joined["measure"], joined["measure"])
    joined = joined[np.lexsort((joined["item"], closeness, joined["code"], joined["row"]))]
    return joined[np.unique(joined["row"], return_index=True)[1]]


def _same_bytes(rows: Rows, evaluation: Evaluation) -> np.ndarray:
    prefix = np.ascontiguousarray(rows.sha256[:, :8]).view(np.uint64)[:, 0]
    wanted = np.ascontiguousarray(evaluation.sha256[:, :8]).view(np.uint64)[:, 0]
    items: dict[bytes, int] = {}
    for item, value in enumerate(evaluation.sha256):
        items.setdefault(value.tobytes(), item)
    found = [(row, items[value]) for row in np.flatnonzero(np.isin(prefix, wanted)) if (value := rows.sha256[row].tobytes()) in items]
    row, item = np.array(found, np.int64).reshape(-1, 2).T
    return records(_FOUND, row=row, item=item, code=np.full(len(row), EVAL_IMAGE))


def _same_picture(rows: Rows, evaluation: Evaluation, distance: int) -> np.ndarray:
    items = np.flatnonzero(is_telling(evaluation.phash))
    ours = np.flatnonzero(is_telling(rows.phash))
    if not len(items) or not len(ours):
        return _nothing()
    hashes = np.concatenate([evaluation.phash[items], rows.phash[ours]])
    later, earlier, bits = matches(hashes, distance, num_fixed=len(items), fixed_only=True)
    return records(_FOUND, row=ours[later - len(items)], item=items[earlier], code=np.full(len(later), EVAL_IMAGE), measure=bits)


def _same_caption(texts: Texts, evaluation: Evaluation, bands: Bands) -> np.ndarray:
    """All captions near an evaluation caption: their rows and those items."""
    items = np.flatnonzero(evaluation.has_caption)
    best = np.zeros(len(texts.hashes), np.int64)
    best_item = np.full(len(texts.hashes), -1)
    for theirs, ours in zip(evaluation.band_keys[:, items], texts.band_keys[-1], strict=True):
        for later, earlier in colliding(np.concatenate([theirs, ours]), num_fixed=len(items), fixed_only=True, cap=BUCKET_CAP):
            text, item = later - len(items), items[earlier]
            agreed = agreement(texts.sketches[text], evaluation.sketches[item])
            order = np.lexsort((item, -agreed, text))
            order = order[np.unique(text[order], return_index=True)[1]]
            text, item, agreed = text[order], item[order], agreed[order]
            better = (agreed >= bands.min_agreement) & ((agreed > best[text]) | ((agreed == best[text]) & (item < best_item[text])))
            best[text[better]], best_item[text[better]] = agreed[better], item[better]
    row = np.flatnonzero(texts.of_row >= 0)
    row = row[best_item[texts.of_row[row]] >= 0]
    text = texts.of_row[row]
    return records(_FOUND, row=row, item=best_item[text], code=np.full(len(row), EVAL_CAPTION), measure=best[text])


def _store_rows(storage: Storage, number: int, rows: Rows, found: np.ndarray) -> None:
    """What the last step needs to turn ids into rows, and the verdicts that are already clear."""
    buffer = io.BytesIO()
    np.savez(buffer, ids=rows.ids, offsets=rows.offsets, found=found)
    storage.put_bytes(path_of("gather", f"{number:06d}.rows.npz"), buffer.getvalue())


def _store_columns(storage: Storage, task: GatherTask, rows: Rows, left: np.ndarray) -> None:
    if needs_exact(task.dedup):
        columns = records(EXACT, value=rows.sha256[left], id=rows.ids[left])
        write_buckets(storage, path_of("gather", f"{task.number:06d}.exact"), columns, rows.sha256[left][:, 0], NUM_BUCKETS)
    if task.dedup.image_distance is not None:
        left = left & is_telling(rows.phash)
        columns = records(HASH, value=shuffled_bits(rows.phash[left]), id=rows.ids[left])
        write_buckets(storage, path_of("gather", f"{task.number:06d}.image"), columns, bucket_of(mix(columns["value"])), NUM_BUCKETS)


def _store_texts(storage: Storage, number: int, texts: Texts, ids: np.ndarray, left: np.ndarray) -> None:
    left = left & (texts.of_row >= 0)
    of_row, ids = texts.of_row[left], ids[left]
    columns = records(HASH, value=texts.hashes[of_row], id=ids)
    write_buckets(storage, path_of("gather", f"{number:06d}.text"), columns, bucket_of(columns["value"]), NUM_BUCKETS)
    first = np.full(len(texts.hashes), BASE)
    np.minimum.at(first, of_row, ids)
    used = np.flatnonzero(first < BASE)
    for band, keys in enumerate(texts.band_keys[0]):
        columns = records(BAND, key=keys[used], text=texts.hashes[used], id=first[used], sketch=texts.sketches[used])
        write_buckets(storage, path_of("gather", f"{number:06d}.band-{band:02d}"), columns, bucket_of(columns["key"]), NUM_BUCKETS)
