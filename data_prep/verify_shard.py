"""One shard against everything that is said of it: manifest, index, sidecar, and its members against each other."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator

import numpy as np
import xxhash

from configs.errors import UserError
from data_prep import metadata
from data_prep.images.encode import decode_stored
from data_prep.part import is_heldout
from data_prep.schema import ImageInfo, Manifest, ShardIndex, ShardInfo, index_path, tar_path
from data_prep.storage import Storage


def check_shard(storage: Storage, manifest: Manifest, split: str, shard: ShardInfo, seen: set[bytes]) -> Iterator[str]:
    """One line for every disagreement, naming the file and, where possible, the member.

    Args:
        seen: keys of the shards before; those of this one are added.
    """
    path = tar_path(shard.name)
    index, problems = _read_index(storage, shard)
    yield from problems
    if index is not None:
        yield from _check_index(index, shard, split, manifest, seen)
        if shard.metadata_sha256:
            yield from _check_sidecar(storage, shard, index)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        yield f"{path}: missing"
        return
    if len(data) != shard.num_bytes:
        yield f"{path}: {len(data)} bytes, the manifest says {shard.num_bytes}"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield f"{path}: sha256 differs from the manifest"
    if index is not None:
        yield from _check_members(data, index, manifest, path)


def _read_index(storage: Storage, shard: ShardInfo) -> tuple[ShardIndex | None, list[str]]:
    path = index_path(shard.name)
    problems = []
    try:
        raw = storage.read_bytes(path)
        if hashlib.sha256(raw).hexdigest() != shard.index_sha256:
            problems.append(f"{path}: sha256 differs from the manifest")
        return ShardIndex.from_bytes(raw), problems
    except FileNotFoundError:
        return None, [f"{path}: missing"]
    except ValueError as error:
        return None, [*problems, f"{path}: {error}"]


def _check_index(index: ShardIndex, shard: ShardInfo, split: str, manifest: Manifest, seen: set[bytes]) -> Iterator[str]:
    path = index_path(shard.name)
    if len(index) != shard.num_samples:
        yield f"{path}: {len(index)} samples, the manifest says {shard.num_samples}"
    for key in index.keys.tolist():
        if key in seen:
            yield f"{path}: key {key.decode()} occurs twice in the data set"
        if key.isdigit() and int(key) >= manifest.num_planned:
            yield f"{path}: key {key.decode()}, but the manifest has numbered {manifest.num_planned} samples only: a later one would get the same key"
        seen.add(key)
    if not manifest.splits["heldout"].shards:
        return  # everything went to train, whatever its hash
    heldout = is_heldout(index.sha256, manifest.config["heldout_permille"])
    for row in np.flatnonzero(heldout != (split == "heldout")).tolist():
        yield f"{path}: {index.keys[row].decode()} belongs to the other split by its content hash"


def _check_sidecar(storage: Storage, shard: ShardInfo, index: ShardIndex) -> Iterator[str]:
    path = metadata.metadata_path(shard.name)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        yield f"{path}: missing"
        return
    if hashlib.sha256(data).hexdigest() != shard.metadata_sha256:
        yield f"{path}: sha256 differs from the manifest"
    try:
        table = metadata.load(storage, shard.name)
    except (UserError, OSError) as error:  # pyarrow's own errors for broken files are OSErrors too
        yield f"{path}: not readable: {error}"
        return
    if table.schema.names != metadata.schema().names:
        yield f"{path}: columns {', '.join(table.schema.names)}, expected {', '.join(metadata.schema().names)}"
        return
    keys = [key.decode() for key in index.keys.tolist()]
    if table.num_rows != len(keys):
        yield f"{path}: {table.num_rows} rows, the index has {len(keys)} samples"
        return
    for name, expected in (("key", keys), ("sha256", [row.tobytes() for row in index.sha256])):
        for row, (found, wanted) in enumerate(zip(table.column(name).to_pylist(), expected, strict=True)):
            if found != wanted:
                yield f"{path}: row {row} has another {name} than the index, whose sample is {keys[row]}"
                break


def _check_members(data: bytes, index: ShardIndex, manifest: Manifest, path: str) -> Iterator[str]:
    """Reads the tar to its end with Python's own reader, and every member against the index."""
    extensions = (manifest.image.extension, "txt", "json")
    names = [f"{key.decode()}.{extension}" for key in index.keys for extension in extensions]
    offsets, sizes, checksums = (array.reshape(-1) for array in (index.offsets, index.sizes, index.xxh3))
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            found = [(member.name, member.offset_data, member.size) for member in archive]
        expected = list(zip(names, offsets.tolist(), sizes.tolist(), strict=True))
        if found != expected:
            wrong = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
            yield f"{path}: its members and the index part ways at member {wrong}" + (f" ({names[wrong]})" if wrong < len(names) else "")
    except tarfile.TarError as error:
        yield f"{path}: not readable to its end: {error}"
    for number, (name, offset, size, checksum) in enumerate(zip(names, offsets, sizes, checksums, strict=True)):
        member = data[offset : offset + size]
        if len(member) != size or xxhash.xxh3_64_intdigest(member) != int(checksum):
            yield f"{path}: member {name} is damaged"
        elif number % 3 == 0:
            yield from _check_image(member, manifest.image, f"{path}: member {name}")
        elif number % 3 == 2 and (problem := _json_problem(member, index, number // 3)):
            yield f"{path}: member {name} {problem}"


def _check_image(member: bytes, image: ImageInfo, where: str) -> Iterator[str]:
    try:
        pixels = decode_stored(member)
    except Exception as error:  # whatever a decoder raises on damaged bytes is a finding
        yield f"{where} does not decode: {type(error).__name__} {error}"
        return
    height, width, *channels = pixels.shape
    sides = (min(height, width),) if image.resize_mode == "keep_ratio" else (height, width)
    if any(side != image.resolution for side in sides) or (channels or [1]) != [image.channels]:
        shape = "on the shorter side" if image.resize_mode == "keep_ratio" else "square"
        yield f"{where} is {pixels.shape}, the manifest says {image.resolution} pixels {shape}, {image.channels} channels"


def _json_problem(member: bytes, index: ShardIndex, row: int) -> str:
    try:
        values = json.loads(member)
        same = values["key"] == index.keys[row].decode() and values["sha256"] == index.sha256[row].tobytes().hex()
    except (ValueError, KeyError, TypeError) as error:
        return f"is not the JSON of a sample: {error}"
    return "" if same else "names another key or content hash than the index"
