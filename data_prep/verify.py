"""`jetway verify`: every checksum of a data set, and whether its parts agree with each other."""

import argparse
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep.images.encode import decode_stored
from data_prep.process import is_heldout
from data_prep.schema import Manifest, ShardIndex, ShardInfo, index_path, tar_path
from data_prep.storage import Storage, open_storage


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway verify`: 0 if everything agrees, 1 if anything does not."""
    parser = argparse.ArgumentParser(prog="jetway verify", description="Check every checksum of a data set, and index against tar against manifest.")
    parser.add_argument("data_set", metavar="DATASET", help="folder or s3:// prefix")
    parser.add_argument("--generation", type=int, help="manifest generation (default: the newest)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be read; `verify` never writes anything")
    arguments = parser.parse_args(argv)
    storage = open_storage(arguments.data_set)
    manifest = Manifest.load(storage, arguments.generation)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    size = sum(shard.num_bytes for shard in shards)
    if arguments.dry_run:
        print(f"would read {len(shards):,} shards, {size / 2**20:,.1f} MiB, of generation {manifest.generation}")
        return 0
    num_problems = 0
    with tqdm(total=size, desc="verify", unit="B", unit_scale=True) as progress:
        for problem in verify(storage, manifest, progress):
            num_problems += 1
            progress.write(problem)
    if num_problems:
        print(f"{arguments.data_set}: {num_problems:,} problems")
        return 1
    samples = sum(split.num_samples for split in manifest.splits.values())
    print(f"{arguments.data_set}: generation {manifest.generation}, {len(shards):,} shards, {samples:,} samples: all checksums agree")
    return 0


def verify(storage: Storage, manifest: Manifest, progress: "tqdm[Any]") -> Iterator[str]:
    """One line for every disagreement, naming the file and, where possible, the member."""
    yield from _check_tokenizer(storage, manifest)
    seen: set[bytes] = set()
    for name, split in manifest.splits.items():
        if split.num_samples != sum(shard.num_samples for shard in split.shards):
            yield f"manifest: {name} says {split.num_samples} samples, its shards {sum(shard.num_samples for shard in split.shards)}"
        for shard in split.shards:
            yield from _check_shard(storage, manifest, name, shard, seen)
            progress.update(shard.num_bytes)
    counts = manifest.counts
    if counts.read != counts.kept + sum(counts.dropped.values()):
        yield f"manifest: {counts.read} samples read, but {counts.kept} kept and {sum(counts.dropped.values())} dropped"


def _check_tokenizer(storage: Storage, manifest: Manifest) -> Iterator[str]:
    try:
        found = hashlib.sha256(storage.read_bytes(manifest.tokenizer.file)).hexdigest()
    except FileNotFoundError:
        yield f"{manifest.tokenizer.file}: missing"
        return
    if found != manifest.tokenizer.sha256:
        yield f"{manifest.tokenizer.file}: sha256 is {found}, the manifest says {manifest.tokenizer.sha256}"


def _check_shard(storage: Storage, manifest: Manifest, split: str, shard: ShardInfo, seen: set[bytes]) -> Iterator[str]:
    path = tar_path(shard.name)
    index: ShardIndex | None = None
    try:
        raw = storage.read_bytes(index_path(shard.name))
        if hashlib.sha256(raw).hexdigest() != shard.index_sha256:
            yield f"{index_path(shard.name)}: sha256 differs from the manifest"
        index = ShardIndex.from_bytes(raw)
    except FileNotFoundError:
        yield f"{index_path(shard.name)}: missing"
    except ValueError as error:
        yield f"{index_path(shard.name)}: {error}"
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
        yield from _check_index(index, shard, split, manifest, seen)


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
            yield from _check_image(member, manifest, f"{path}: member {name}")
        elif number % 3 == 2 and (problem := _json_problem(member, index, number // 3)):
            yield f"{path}: member {name} {problem}"


def _check_image(member: bytes, manifest: Manifest, where: str) -> Iterator[str]:
    resolution, channels = manifest.image.resolution, manifest.image.channels
    expected = (resolution, resolution) if channels == 1 else (resolution, resolution, channels)
    try:
        shape = decode_stored(member).shape
    except Exception as error:  # whatever a decoder raises on damaged bytes is a finding
        yield f"{where} does not decode: {type(error).__name__} {error}"
        return
    if shape != expected:
        yield f"{where} is {shape}, the manifest says {expected}"


def _json_problem(member: bytes, index: ShardIndex, row: int) -> str:
    try:
        values = json.loads(member)
        same = values["key"] == index.keys[row].decode() and values["sha256"] == index.sha256[row].tobytes().hex()
    except (ValueError, KeyError, TypeError) as error:
        return f"is not the JSON of a sample: {error}"
    return "" if same else "names another key or content hash than the index"


def _check_index(index: ShardIndex, shard: ShardInfo, split: str, manifest: Manifest, seen: set[bytes]) -> Iterator[str]:
    path = index_path(shard.name)
    if len(index) != shard.num_samples:
        yield f"{path}: {len(index)} samples, the manifest says {shard.num_samples}"
    for key in index.keys.tolist():
        if key in seen:
            yield f"{path}: key {key.decode()} occurs twice in the data set"
        seen.add(key)
    if not manifest.splits["heldout"].shards:
        return  # everything went to train, whatever its hash
    heldout = is_heldout(index.sha256, manifest.config["heldout_permille"])
    for row in np.flatnonzero(heldout != (split == "heldout")).tolist():
        yield f"{path}: {index.keys[row].decode()} belongs to the other split by its content hash"
