"""Evaluation sets as arrays: what a training sample must not be close to.

A set is a finished jetway data set (its sidecars hold everything), or any input of images, which are then prepared with the image settings
of the run, so that the hashes compare. Listed in the driver, read by tasks, joined once.
"""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs.errors import UserError
from data_prep import metadata
from data_prep.config import FilterConfig, PrepConfig
from data_prep.dedup.caption import SKETCH_BYTES, choose_bands, minima_of, normalize, sketches_of
from data_prep.dedup.store import path_of
from data_prep.readers.base import RawSample, Slice
from data_prep.reasons import Drop
from data_prep.schema import Manifest, generations
from data_prep.storage import Storage, open_storage

logger = logging.getLogger(__name__)

_ARRAYS = path_of("evaluation.npz")
_NAMES = path_of("evaluation.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTask:
    """Some items of one evaluation set: a shard of a data set, or a slice of an input."""

    set_path: str
    """As `dedup.evaluation` names it."""
    shard: str = ""
    metadata_sha256: str = ""
    part: Slice | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """All items of all evaluation sets. E of them."""

    sha256: np.ndarray
    """uint8 [E, 32]."""
    phash: np.ndarray
    """uint64 [E]; 0, which `image.is_telling` refuses, where there is no picture."""
    has_picture: np.ndarray
    """bool [E]."""
    sketches: np.ndarray
    """uint8 [E, SKETCH_BYTES]; [0, SKETCH_BYTES] if captions are not compared."""
    band_keys: np.ndarray
    """uint64 [bands, E]; [0, 0] if captions are not compared."""
    has_caption: np.ndarray
    """bool [E]."""

    def __len__(self) -> int:
        return len(self.phash)

    @classmethod
    def load(cls, storage: Storage) -> "Evaluation":
        """What `join_evaluation` stored."""
        with np.load(io.BytesIO(storage.read_bytes(_ARRAYS)), allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in cls.__slots__})


def plan_evaluation(config: PrepConfig) -> list[EvaluationTask]:
    """Lists the evaluation sets of the configuration.

    Raises:
        UserError: a set is missing, holds nothing, or was prepared in a way that its hashes do not compare.
    """
    tasks: list[EvaluationTask] = []
    for path in config.dedup.evaluation:
        storage = open_storage(path)
        found = _plan_data_set(config, path, storage) if generations(storage) else _plan_input(config, path)
        if not found:
            raise UserError(f"dedup.evaluation: {path} holds no samples", expected="images, or a data set made by jetway", fix="check the path")
        tasks += found
    return tasks


def read_evaluation(config: PrepConfig, task: EvaluationTask, number: int) -> dict[str, int]:
    """Reads the items of a task and stores them; returns how many there are and how many pictures were unusable."""
    items = _read_shard(task) if task.part is None else _read_slice(config, task.part)
    hashes = np.array([phash or 0 for _, _, phash, _ in items], np.uint64)
    has_picture = np.array([phash is not None for _, _, phash, _ in items], bool)
    digests = np.frombuffer(b"".join(sha256 for _, sha256, _, _ in items), np.uint8).reshape(-1, 32)
    storage = open_storage(config.output)
    buffer = io.BytesIO()
    np.savez(buffer, phash=hashes, sha256=digests, has_picture=has_picture)
    storage.put_bytes(path_of("evaluation", f"{number:06d}.npz"), buffer.getvalue())
    title = task.set_path.rstrip("/").rpartition("/")[2]
    names = [name.removeprefix(f"{title}/").removeprefix(f"{title}#") for name, _, _, _ in items]
    texts = {"names": [f"{title}:{name}" for name in names], "captions": [caption for _, _, _, caption in items]}
    storage.put_bytes(path_of("evaluation", f"{number:06d}.texts.json"), json.dumps(texts).encode())
    return {"num_items": len(items), "num_unusable": int((~has_picture).sum())}


def join_evaluation(config: PrepConfig, set_paths: Sequence[str]) -> dict[str, str]:
    """Joins what the tasks stored; returns the digest of every set, by its path.

    Args:
        config: of the run.
        set_paths: the set of every task, in the order of the tasks.

    Raises:
        UserError: not one picture of a set can be used.
    """
    storage = open_storage(config.output)
    names: list[str] = []
    captions: list[str] = []
    pictures: dict[str, list[np.ndarray]] = {"phash": [], "sha256": [], "has_picture": []}
    sets: list[str] = []
    for number, path in enumerate(set_paths):
        with np.load(io.BytesIO(storage.read_bytes(path_of("evaluation", f"{number:06d}.npz"))), allow_pickle=False) as arrays:
            for name, found in pictures.items():
                found.append(arrays[name])
        texts = json.loads(storage.read_bytes(path_of("evaluation", f"{number:06d}.texts.json")))
        names += texts["names"]
        captions += texts["captions"]
        sets += [path] * len(texts["names"])
    columns = {name: np.concatenate(found) for name, found in pictures.items()}
    evaluation = build_evaluation(**columns, captions=captions, caption_similarity=config.dedup.evaluation_caption_similarity)
    owner = np.array(sets)
    for path in dict.fromkeys(set_paths):
        if not evaluation.has_picture[owner == path].any():
            raise UserError(f"dedup.evaluation: not one picture of {path} can be used", fix="check what it holds, or leave it out")
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(evaluation, name) for name in Evaluation.__slots__})
    storage.put_bytes(_NAMES, json.dumps(names).encode())
    storage.put_bytes(_ARRAYS, buffer.getvalue())
    return {path: digest(evaluation, owner == path, captions) for path in dict.fromkeys(set_paths)}


def item_names(storage: Storage) -> list[str]:
    """`set:item` of every evaluation item, for people."""
    names: list[str] = json.loads(storage.read_bytes(_NAMES))
    return names


def build_evaluation(
    *,
    phash: np.ndarray,
    sha256: np.ndarray,
    has_picture: np.ndarray,
    captions: Sequence[str],
    caption_similarity: float | None,
) -> Evaluation:
    """Items as arrays.

    Args:
        phash, sha256, has_picture: as in `Evaluation`.
        captions: E of them, empty where there is none.
        caption_similarity: `dedup.evaluation_caption_similarity`.
    """
    texts = normalize(captions)
    if caption_similarity is None:
        sketches, keys = np.zeros((0, SKETCH_BYTES), np.uint8), np.zeros((0, 0), np.uint64)
    else:
        minima = np.concatenate([np.zeros((128, 0), np.uint32), *minima_of(texts)], axis=1)
        sketches, keys = sketches_of(minima), choose_bands(caption_similarity).keys(minima)
    has_caption = np.array([bool(text) for text in texts], bool)
    return Evaluation(phash=phash, sha256=sha256, has_picture=has_picture, sketches=sketches, band_keys=keys, has_caption=has_caption)


def digest(evaluation: Evaluation, rows: np.ndarray, captions: Sequence[str]) -> str:
    """Hex SHA-256 of some items: of their pictures' hashes and their captions.

    Args:
        evaluation: the items.
        rows: which of them, bool [E].
        captions: of all E items.
    """
    hasher = hashlib.sha256(evaluation.phash[rows].astype("<u8").tobytes())
    hasher.update(np.ascontiguousarray(evaluation.sha256[rows]).tobytes())
    hasher.update(json.dumps([captions[row] for row in np.flatnonzero(rows).tolist()]).encode())
    return hasher.hexdigest()


_Item = tuple[str, bytes, int | None, str]
"""(name, SHA-256, perceptual hash if the picture can be used, caption)."""


def _plan_data_set(config: PrepConfig, path: str, storage: Storage) -> list[EvaluationTask]:
    manifest = Manifest.load(storage)
    ours, theirs = config.image.resize_mode, manifest.image.resize_mode
    if ours != theirs:
        raise UserError(
            f"dedup.evaluation: the pictures of {path} were cut differently, so their hashes do not compare with ours",
            got=f"resize_mode={theirs}",
            expected=f"resize_mode={ours}",
            fix="name the original pictures of that set, or prepare it again with our image settings",
        )
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return [EvaluationTask(set_path=path, shard=shard.name, metadata_sha256=shard.metadata_sha256) for shard in shards]


def _plan_input(config: PrepConfig, path: str) -> list[EvaluationTask]:
    from data_prep.inputs import list_inputs
    from data_prep.plan import READERS

    return [EvaluationTask(set_path=path, part=part) for kind, url in list_inputs(path) for part in READERS[kind].plan(url, config)]


def _read_shard(task: EvaluationTask) -> list[_Item]:
    columns = ["key", "sha256", "phash", "caption"]
    table = metadata.load(open_storage(task.set_path), task.shard, columns=columns, sha256=task.metadata_sha256)
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    return list(rows)


def _read_slice(config: PrepConfig, part: Slice) -> list[_Item]:
    from data_prep.plan import READERS

    return [_prepare(raw, config) for raw in READERS[part.kind].read(part, config)]


def _prepare(raw: RawSample, config: PrepConfig) -> _Item:
    """One item; a picture that cannot be used leaves its caption and, where there are bytes, their digest."""
    from data_prep.images.prepare import prepare_image

    if raw.url is not None and not raw.image:
        raise UserError(
            "dedup.evaluation cannot fetch addresses",
            got=raw.source,
            expected="image files, or a data set made by jetway",
            fix="make a data set of the list with `jetway prep`, and name its folder",
        )
    caption = " ".join((raw.caption or "").split())
    phash = None
    if raw.problem is None:
        try:
            limits = replace(config.limits, max_aspect_ratio=1e9, min_side=1)
            phash = prepare_image(raw.image, config.image, limits, FilterConfig(), config.limits.max_decode_bytes).phash
        except Drop as problem:
            logger.warning("evaluation item %s: %s %s", raw.source, problem.reason, problem.detail)
    return raw.source, hashlib.sha256(raw.image).digest(), phash, caption
