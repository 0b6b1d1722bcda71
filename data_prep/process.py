"""The work of one task, as plain functions: raw samples -> a part, and parts -> a shard.

Two steps, so that shards come out equally full whatever was dropped: first every task of the plan writes one *part* (its kept
samples in order), then, with all counts known, every shard copies its share from one to three parts. Copying is cheap beside
decoding. Both steps give the same bytes for the same task, wherever and however often they run.
"""

import hashlib
import json
import secrets
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import xxhash

from configs.errors import UserError
from data_prep.config import PrepConfig
from data_prep.images.prepare import prepare_image
from data_prep.plan import READERS, Task
from data_prep.readers.base import RawSample
from data_prep.reasons import Drop
from data_prep.schema import ShardIndex, ShardInfo, tar_path
from data_prep.shard_writer import Sample, ShardWriter
from data_prep.storage import Storage, open_storage, writing

PARTS = "parts"
"""Folder of the intermediate parts and of the records that say which parts and shards are finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecord:
    """What a finished task reports. Stored last: a part counts once its record exists."""

    number: int
    read: int
    kept: int
    num_heldout: int
    dropped: Mapping[str, int]
    index_sha256: str
    """Empty if nothing was kept, and hence no part written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Samples `start` to `stop` of those samples of a part that belong to one split."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """Which samples make one shard."""

    name: str
    is_heldout: bool
    heldout_permille: int
    pieces: tuple[Piece, ...]


def is_heldout(sha256: np.ndarray, permille: int) -> np.ndarray:
    """Whether samples belong to the held-out split: bool [N] from the content hashes uint8 [N, 32].

    A function of the original bytes alone: it stays the same when the input grows, and copies of an image stay together.
    """
    leading = np.ascontiguousarray(sha256[:, :8]).view(">u8")[:, 0]
    return leading % np.uint64(1000) < np.uint64(permille)


def prepare_sample(raw: RawSample, key: str, config: PrepConfig) -> Sample:
    """One raw sample as it will stand in the data set.

    Raises:
        Drop: with the reason.
    """
    if raw.problem is not None:
        raise raw.problem
    caption = clean_caption(raw.caption or "")
    if not caption and config.missing_caption == "drop":
        raise Drop("missing_caption")
    if len(caption.encode()) > config.limits.max_caption_bytes:
        raise Drop("caption_too_long", f"{len(caption.encode())} bytes")
    if len(raw.image) > config.limits.max_file_bytes:
        raise Drop("file_too_large", f"{len(raw.image)} bytes")
    image = prepare_image(raw.image, config.image, config.limits, config.filters, config.ray.memory_per_task_bytes)
    digest = hashlib.sha256(raw.image)
    values: dict[str, Any] = {
        "key": key,
        "caption": caption,
        "source": raw.source,
        "width": image.width,
        "height": image.height,
        "format": image.format,
        "sha256": digest.hexdigest(),
    }
    if raw.label is not None:
        values["label"] = raw.label
    if raw.extra:
        values["extra"] = raw.extra
    return Sample(key=key, image=image.data, txt=caption.encode(), json=_json(values), sha256=digest.digest())


def clean_caption(text: str) -> str:
    """The caption with runs of white space made one space, and what UTF-8 cannot hold replaced."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def write_part(config: PrepConfig, task: Task) -> PartRecord:
    """Prepares all samples of a task and publishes the part, its failure ledger, and its record.

    Raises:
        UserError: the output is full or not writable. A bad sample raises nothing: it is dropped and listed.
    """
    cv2.setNumThreads(1)  # one task per CPU: OpenCV's own threads would fight over them
    storage = open_storage(config.output)
    name = part_name(task.number)
    failures: list[dict[str, str]] = []
    num_heldout, index_sha256 = 0, ""
    scratch = storage.scratch() / f"{name}.{secrets.token_hex(6)}"  # unique: a killed run's worker may still be writing its own
    with writing(f"{config.output}/{PARTS}/{name}.tar"), ShardWriter(scratch, config.image.format) as writer:
        for number, raw in enumerate(_raw_samples(config, task), start=task.first_sample):
            key = f"{number:010d}"
            try:
                writer.add(prepare_sample(raw, key, config))
            except Drop as problem:
                failures.append({"source": raw.source, "key": key, "reason": problem.reason, "detail": problem.detail})
        kept = len(writer)
        if kept:
            num_heldout = int(is_heldout(writer.content_hashes(), config.heldout_permille).sum())
            index_sha256 = writer.publish(storage, name, folder=PARTS).index_sha256
    if failures:
        storage.put_bytes(f"ledger/failures-{task.number:06d}.jsonl", b"".join(_json(failure) + b"\n" for failure in failures))
    record = PartRecord(
        number=task.number,
        read=kept + len(failures),
        kept=kept,
        num_heldout=num_heldout,
        dropped=dict(sorted(Counter(failure["reason"] for failure in failures).items())),
        index_sha256=index_sha256,
    )
    storage.put_bytes(f"{PARTS}/{name}.json", _json(asdict(record)))
    return record


def plan_shards(parts: Sequence[PartRecord], config: PrepConfig) -> list[ShardPlan]:
    """Cuts each split, in the order of the plan, into shards of `samples_per_shard` (the last one takes the rest).

    Where no sample hashes to the train split (a folder of one image), everything goes there.
    """
    permille = config.heldout_permille
    if sum(part.num_heldout for part in parts) == sum(part.kept for part in parts):
        permille = 0
    shards = []
    for split in ("train", "heldout"):
        counts = [part.num_heldout if permille else 0 for part in parts]
        if split == "train":
            counts = [part.kept - heldout for part, heldout in zip(parts, counts, strict=True)]
        for number, pieces in enumerate(_cut([part.number for part in parts], counts, config.samples_per_shard)):
            name = f"{split}-{number:06d}"
            shards.append(ShardPlan(name=name, is_heldout=split == "heldout", heldout_permille=permille, pieces=pieces))
    return shards


def write_shard(config: PrepConfig, shard: ShardPlan) -> ShardInfo:
    """Copies the samples of one shard from the parts and publishes it with its index and its record.

    Raises:
        UserError: the output is full or not writable, or a part is damaged.
    """
    storage = open_storage(config.output)
    scratch = storage.scratch() / f"{shard.name}.{secrets.token_hex(6)}"
    with writing(f"{config.output}/{tar_path(shard.name)}"), ShardWriter(scratch, config.image.format) as writer:
        for piece in shard.pieces:
            for sample in _part_samples(storage, piece, shard):
                writer.add(sample)
        info = writer.publish(storage, shard.name)
    storage.put_bytes(f"{PARTS}/{shard.name}.json", _json(asdict(info)))
    return info


def finished_parts(storage: Storage) -> dict[int, PartRecord]:
    """Records of the parts that an earlier run finished, by task number."""
    paths = [path for path in storage.list(f"{PARTS}/part-") if path.endswith(".json")]
    records = [PartRecord(**json.loads(storage.read_bytes(path))) for path in paths]
    return {record.number: record for record in records}


def finished_shards(storage: Storage) -> dict[str, ShardInfo]:
    """Records of the shards that an earlier run finished, by name."""
    paths = [path for path in storage.list(f"{PARTS}/") if path.endswith(".json") and "/part-" not in path]
    records = [ShardInfo(**json.loads(storage.read_bytes(path))) for path in paths]
    return {record.name: record for record in records}


def part_name(number: int) -> str:
    """Name of the part that task `number` writes."""
    return f"part-{number:06d}"


def _raw_samples(config: PrepConfig, task: Task) -> Iterator[RawSample]:
    """The task's samples, exactly as many as planned: an input that has shrunk since must not shift the keys of the others."""
    for part in task.slices:
        number = 0
        try:
            for raw in READERS[part.kind].read(part, config):
                yield raw
                number += 1
        except (OSError, tarfile.TarError) as error:
            problem = Drop("missing_file" if isinstance(error, FileNotFoundError) else "unreadable", str(error))
        else:
            problem = Drop("missing_file", "the input has shrunk since the plan was made")
        for missing in range(number, part.count):
            yield RawSample(source=f"{Path(part.path).name}#{part.start + missing}", problem=problem)


def _part_samples(storage: Storage, piece: Piece, shard: ShardPlan) -> Iterator[Sample]:
    name = part_name(piece.part)
    index = ShardIndex.load(storage, name, folder=PARTS)
    rows = np.flatnonzero(is_heldout(index.sha256, shard.heldout_permille) == shard.is_heldout)[piece.start : piece.stop]
    begin = int(index.offsets[rows[0], 0])
    data = storage.read_range(tar_path(name, PARTS), begin, int(index.offsets[rows[-1], 2] + index.sizes[rows[-1], 2]) - begin)
    for row in rows:
        members = []
        for offset, size, checksum in zip(index.offsets[row] - begin, index.sizes[row], index.xxh3[row], strict=True):
            member = data[offset : offset + size]
            if xxhash.xxh3_64_intdigest(member) != int(checksum):
                raise UserError(
                    f"{storage.url}/{tar_path(name, PARTS)} is damaged",
                    got=f"other bytes for {index.keys[row].decode()}",
                    fix=f"delete {PARTS}/{name}.json below the output, then run the same command again",
                )
            members.append(member)
        yield Sample(key=index.keys[row].decode(), image=members[0], txt=members[1], json=members[2], sha256=index.sha256[row].tobytes())


def _cut(numbers: Sequence[int], counts: Sequence[int], size: int) -> Iterator[tuple[Piece, ...]]:
    """Runs of `size` samples through parts that hold `counts`; the last run may be shorter, none is empty."""
    pieces: list[Piece] = []
    room = size
    for number, count in zip(numbers, counts, strict=True):
        start = 0
        while start < count:
            stop = min(count, start + room)
            pieces.append(Piece(part=number, start=start, stop=stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield tuple(pieces)
                pieces, room = [], size
    if pieces:
        yield tuple(pieces)


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")
