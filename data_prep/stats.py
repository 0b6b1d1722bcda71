"""`jetway stats`: histograms of a data set: original sizes, caption lengths in tokens, labels, splits, drops."""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from configs.errors import UserError
from data_prep import metadata
from data_prep.reasons import explain
from data_prep.run import summary
from data_prep.samples import chosen_rows, num_usable, shard_samples, stored_samples
from data_prep.schema import SPLITS, Manifest, ShardIndex, ShardInfo
from data_prep.storage import Storage, open_storage
from data_prep.tokenizer import load_tokenizer
from data_prep.tombstones import Rows, Tombstones, load

BAR = 40
SIDES = (0, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
TOKENS = (0, 1, 5, 9, 17, 33, 49, 65, 97, 129, 257)


@dataclass
class Statistics:
    """What is counted, over the samples looked at."""

    num_samples: int = 0
    sides: list[int] = field(default_factory=list)
    """Shorter side of the original, in pixels."""
    tokens: list[int] = field(default_factory=list)
    """Caption length in tokens, with the end-of-sequence token."""
    image_bytes: list[int] = field(default_factory=list)
    """Size of the stored image."""
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway stats`."""
    parser = argparse.ArgumentParser(prog="jetway stats", description="Histograms of a data set.")
    parser.add_argument("data_set", metavar="DATASET", help="folder or s3:// prefix")
    parser.add_argument("--generation", type=int, help="manifest generation (default: the newest)")
    parser.add_argument("--max-samples", type=int, default=100_000, help="look at this many samples at most, evenly spread (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read; `stats` never writes anything")
    arguments = parser.parse_args(argv)
    if arguments.max_samples < 1:
        raise UserError("--max-samples must be at least 1", got=arguments.max_samples)
    storage = open_storage(arguments.data_set)
    manifest, tombstones = Manifest.load(storage, arguments.generation), load(storage)
    total = sum(num_usable(manifest, split, tombstones) for split in manifest.splits)
    if arguments.dry_run:
        print(f"would read {min(total, arguments.max_samples):,} of {total:,} samples of {arguments.data_set}")
        return 0
    found = gather(arguments.data_set, manifest, arguments.max_samples, tombstones)
    if arguments.json:
        counts = {"counts": asdict(manifest.counts), "taken_down": manifest.counts.kept - total}
        print(json.dumps({"manifest": counts, "statistics": _numbers(found)}))
        return 0
    print(summary(manifest))
    if total < manifest.counts.kept:
        print(f"{'taken down':<10}{manifest.counts.kept - total:>10,} samples (takedown {tombstones.number}); not counted below")
    scope = "all samples" if found.num_samples == total else f"{found.num_samples:,} samples, evenly spread"
    print(f"\nover {scope}:")
    _print_histogram("shorter side of the original, pixels", found.sides, SIDES)
    _print_histogram("caption length, tokens with end of sequence", found.tokens, TOKENS)
    _print_counts("original format", found.formats)
    if found.labels:
        _print_counts("label", found.labels)
    if manifest.counts.dropped:
        _print_counts("dropped", {f"{reason} ({explain(reason)})": number for reason, number in manifest.counts.dropped.items()})
    return 0


def gather(data_set: str, manifest: Manifest, max_samples: int, tombstones: Tombstones) -> Statistics:
    """Counts over at most `max_samples` samples, evenly spread over both splits, without those taken down.

    Reads the sidecars where there are any. They hold no labels: where the first sample has one, the samples' JSON is read too.
    """
    storage = open_storage(data_set)
    processor = load_tokenizer(storage, manifest)
    total = sum(num_usable(manifest, split, tombstones) for split in manifest.splits)
    every = max(1, -(-total // max_samples))
    from_sidecars = not _has_labels(storage, manifest, tombstones)
    found = Statistics()
    with tqdm(total=total // every, desc="samples", unit="sample") as progress:
        for split in SPLITS:
            for shard, rows in chosen_rows(manifest, split, tombstones, every=every):
                if shard.metadata_sha256 and from_sidecars:
                    _count_sidecar(found, storage, shard, rows, processor)
                else:
                    _count_members(found, storage, shard, rows, processor)
                progress.update(len(rows))
    return found


def _has_labels(storage: Storage, manifest: Manifest, tombstones: Tombstones) -> bool:
    samples = (sample for split in SPLITS for sample in stored_samples(storage, manifest, split, tombstones=tombstones))
    return any("label" in sample.values for sample in itertools.islice(samples, 1))


def _count_sidecar(found: Statistics, storage: Storage, shard: ShardInfo, rows: Rows, processor: Any) -> None:
    columns = ["width", "height", "format", "caption"]
    table = metadata.load(storage, shard.name, columns=columns, sha256=shard.metadata_sha256).take(rows)
    index = ShardIndex.load(storage, shard.name, sha256=shard.index_sha256)
    found.num_samples += len(rows)
    found.sides += np.minimum(table.column("width").to_numpy(), table.column("height").to_numpy()).tolist()
    found.tokens += [len(pieces) + 1 for pieces in processor.EncodeAsIds(table.column("caption").to_pylist())]
    found.image_bytes += index.sizes[rows, 0].tolist()
    found.formats.update(table.column("format").to_pylist())


def _count_members(found: Statistics, storage: Storage, shard: ShardInfo, rows: Rows, processor: Any) -> None:
    for sample in shard_samples(storage, shard, rows):
        found.num_samples += 1
        found.sides.append(min(sample.values["width"], sample.values["height"]))
        found.tokens.append(len(processor.EncodeAsIds(sample.caption)) + 1)
        found.image_bytes.append(len(sample.image))
        found.formats[sample.values["format"]] += 1
        if "label" in sample.values:
            found.labels[str(sample.values["label"])] += 1


def _numbers(found: Statistics) -> dict[str, Any]:
    result: dict[str, Any] = {"num_samples": found.num_samples, "formats": found.formats, "labels": found.labels}
    for name in ("sides", "tokens", "image_bytes"):
        values = np.array(getattr(found, name) or [0])
        quantiles = np.quantile(values, (0, 0.05, 0.5, 0.95, 0.99, 1))
        result[name] = dict(zip(("min", "p5", "median", "p95", "p99", "max"), map(float, quantiles), strict=True)) | {"mean": float(values.mean())}
    return result


def _print_histogram(title: str, values: Sequence[int], edges: Sequence[int]) -> None:
    array = np.array(values or [0])
    print(f"\n{title}: median {np.median(array):g}, 95 % {np.quantile(array, 0.95):g}, 99 % {np.quantile(array, 0.99):g}, most {array.max()}")
    counts = np.histogram(array, bins=[*edges, np.inf])[0]
    names = [f"{low}-{high - 1}" for low, high in zip(edges, edges[1:], strict=False)] + [f"{edges[-1]}+"]
    _print_bars([(name, int(count)) for name, count in zip(names, counts, strict=True) if count])


def _print_counts(title: str, counts: dict[str, int] | Counter[str], most: int = 20) -> None:
    print(f"\n{title}:")
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    _print_bars(ranked[:most])
    if len(ranked) > most:
        print(f"  and {len(ranked) - most:,} more")


def _print_bars(rows: Iterable[tuple[str, int]]) -> None:
    rows = list(rows)
    largest, width = max((count for _, count in rows), default=1), max((len(name) for name, _ in rows), default=0)
    for name, count in rows:
        print(f"  {name:<{width}} {count:>10,} {'#' * max(1, round(BAR * count / largest))}")
