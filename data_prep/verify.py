"""`jetway verify`: every checksum of a data set, and whether its parts agree with each other.

Manifest against shards, shards against index and sidecar, generations against those they continue, takedowns against the shards they name.
"""

import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from configs.errors import UserError
from data_prep.schema import LINEAGE_FILE, Manifest, ShardIndex, ShardInfo, generations, manifest_path, read_lineage
from data_prep.storage import Storage, open_storage
from data_prep.takedown import stored_rules
from data_prep.tombstones import FOLDER, Hits, load_files, tombstones_path
from data_prep.verify_shard import check_shard


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
            yield from check_shard(storage, manifest, name, shard, seen)
            progress.update(shard.num_bytes)
    counts = manifest.counts
    if counts.read != counts.kept + sum(counts.dropped.values()):
        yield f"manifest: {counts.read} samples read, but {counts.kept} kept and {sum(counts.dropped.values())} dropped"
    if counts.kept != sum(split.num_samples for split in manifest.splits.values()):
        yield f"manifest: {counts.kept} samples kept, but {sum(split.num_samples for split in manifest.splits.values())} in the splits"
    history = {number: Manifest.load(storage, number) for number in generations(storage)}
    yield from _check_history(storage, manifest, history)
    yield from _check_takedowns(storage, history)


def _check_tokenizer(storage: Storage, manifest: Manifest) -> Iterator[str]:
    try:
        found = hashlib.sha256(storage.read_bytes(manifest.tokenizer.file)).hexdigest()
    except FileNotFoundError:
        yield f"{manifest.tokenizer.file}: missing"
        return
    if found != manifest.tokenizer.sha256:
        yield f"{manifest.tokenizer.file}: sha256 is {found}, the manifest says {manifest.tokenizer.sha256}"


def _check_history(storage: Storage, manifest: Manifest, history: Mapping[int, Manifest]) -> Iterator[str]:
    """Whether the generation continues what it says: its base is there (or was deleted after a compaction), and no key is given twice."""
    where, base = manifest_path(manifest.generation), manifest.base
    try:
        deleted = read_lineage(storage)
    except UserError as error:
        yield f"{LINEAGE_FILE}: {error}"
        return
    if base is None:
        return
    if base >= manifest.generation:
        yield f"{where}: continues generation {base}, which is not an older one"
    elif base not in history:
        if base not in deleted:
            yield f"{where}: continues generation {base}, which is missing"
    elif history[base].num_planned > manifest.num_planned:
        yield f"{where}: has numbered {manifest.num_planned} samples, generation {base} {history[base].num_planned}: keys would be given twice"


def _check_takedowns(storage: Storage, history: Mapping[int, Manifest]) -> Iterator[str]:
    """Whether every takedown is whole and fits the shards that it names. (Shards of deleted generations are gone, as they should be.)"""
    try:
        files = load_files(storage)
        stored_rules(storage, files)
    except UserError as error:
        yield f"{FOLDER}/: {error}"
        return
    shards = {shard.name: shard for manifest in history.values() for split in manifest.splits.values() for shard in split.shards}
    for file in files:
        where = tombstones_path(file.number)
        for name, hits in file.shards.items():
            if name in shards:
                yield from _check_hits(storage, shards[name], hits, f"{where}: {name}")
            elif all(number in history for number in file.generations):
                yield f"{where}: {name} is a shard of no generation"


def _check_hits(storage: Storage, shard: ShardInfo, hits: Hits, where: str) -> Iterator[str]:
    if len(hits.rows) != len(hits.keys) or not all(0 <= row < shard.num_samples for row in hits.rows):
        yield f"{where} does not have the samples that are named"
        return
    try:
        keys = ShardIndex.load(storage, shard.name, sha256=shard.index_sha256).keys
    except UserError as error:
        yield f"{where} cannot be compared: {error.what}"
        return
    for row, key in zip(hits.rows, hits.keys, strict=True):
        if keys[row].decode() != key:
            yield f"{where}: sample {row} is {keys[row].decode()}, not {key}"
