"""Small data sets with everything that a card shows, written by hand: shards, sidecars, statistics, takedowns."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import metadata, run_stats
from data_prep.config import DedupConfig, ImageConfig, PrepConfig, TokenizerConfig, identity, identity_hash
from data_prep.metadata import Facts
from data_prep.run_stats import PartCollector
from data_prep.schema import TOKENIZER_FILE, Counts, ImageInfo, Manifest, ShardInfo, Split, TokenizerInfo
from data_prep.shard_writer import Sample, ShardWriter
from data_prep.storage import Storage, open_storage
from data_prep.tokenizer import train

NASTY = 'a "quoted" <script>alert(1)</script> & \u0007bell, \u96ea'
"""A caption that must not become markup."""

FAILURES = {"dns": 5, "http_404": 7, "too_small": 3, "near_duplicate_image": 2, "opt_out": 1, "blocked_domain": 2}


@dataclass(frozen=True)
class Fetched:
    status: int = 200
    seconds: float = 0.3
    num_attempts: int = 1
    num_bytes: int = 1000


@dataclass(frozen=True)
class Made:
    """A data set on disk and what it was made of."""

    url: str
    storage: Storage
    manifest: Manifest
    captions: list[str]


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def values_of(number: int, caption: str) -> dict[str, Any]:
    width, height = ((640, 480), (480, 640), (200, 150), (1200, 1200))[number % 4]
    values: dict[str, Any] = {"key": f"{number:010d}", "caption": caption, "source": f"list.parquet#{number}", "width": width, "height": height}
    values |= {"format": "jpeg" if number % 5 else "png", "sha256": hashlib.sha256(picture(number)).hexdigest(), "label": number % 3}
    values["extra"] = {"License": "CC-BY 4.0" if number % 2 else "CC0", "LANGUAGE": "en", "similarity": 0.3 + number / 1000}
    return values


def write_shard(storage: Storage, name: str, numbers: range, captions: list[str], with_sidecar: bool) -> ShardInfo:
    rows = []
    with ShardWriter(storage.scratch() / name, "jpg") as writer:
        for number in numbers:
            caption, image = captions[number % len(captions)], picture(number)
            values = values_of(number, caption)
            member = json.dumps(values).encode()
            writer.add(Sample(key=values["key"], image=image, txt=caption.encode(), json=member, sha256=hashlib.sha256(image).digest()))
            rows.append(
                Facts(
                    **{name: values[name] for name in ("key", "source", "caption", "width", "height", "format")},
                    **{"url": f"https://img{number % 3}.example.org/{number}.jpg", "jpeg_quality": 90 if values["format"] == "jpeg" else -1},
                    **{"num_bytes": 50_000 + number, "sha256": hashlib.sha256(image).digest(), "phash": number},
                )
            )
        info = writer.publish(storage, name)
    digest = metadata.dump(storage, name, metadata.table_of(rows)) if with_sidecar else ""
    return replace(info, metadata_sha256=digest)


def write_stats(storage: Storage, generation: int, num_kept: int) -> None:
    collector = PartCollector()
    for number in range(num_kept):
        facts = Facts(
            **{"key": str(number), "source": "", "url": f"https://img{number % 3}.example.org/x.jpg", "caption": "a", "width": 640, "height": 480},
            **{"format": "jpeg", "jpeg_quality": 90, "num_bytes": 100, "sha256": bytes(32), "phash": 0},
        )
        collector.kept(facts, num_bytes_out=10, answer=Fetched())
    for reason, number in FAILURES.items():
        for _ in range(number):
            collector.dropped(reason, "SERVFAIL" if reason == "dns" else "", "https://dead.example.com/x.jpg", Fetched(status=0, seconds=4))
    run_stats.dump_whole(storage, generation, collector.finish())


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Made]:
    """Writes a data set of 12 training and 4 held-out samples a generation."""

    def make(*, sidecars: bool = True, stats: bool = True, generations: int = 1, failures: dict[str, int] | None = None, name: str = "birds") -> Made:
        storage = open_storage(tmp_path / name)
        captions = [NASTY, "", *(f"a bird of kind {number} on a branch" for number in range(10))]
        model = train(captions, TokenizerConfig(vocab_size=300, num_threads=1))
        storage.put_bytes(TOKENIZER_FILE, model)
        config = PrepConfig(inputs=("list.parquet",), image=ImageConfig(resolution=256), dedup=DedupConfig(exact=True, evaluation=("eval/coco",)))
        dropped = FAILURES if failures is None else failures
        train_shards: list[ShardInfo] = []
        heldout_shards: list[ShardInfo] = []
        for generation in range(1, generations + 1):
            infix = "" if generation == 1 else f"g{generation:04d}-"
            first = 16 * (generation - 1)
            train_shards.append(write_shard(storage, f"train-{infix}000000", range(first, first + 12), captions, sidecars))
            heldout_shards.append(write_shard(storage, f"heldout-{infix}000000", range(first + 12, first + 16), captions, sidecars))
            kept = 16 * generation
            manifest = Manifest(
                generation=generation,
                config=identity(config),
                config_hash=identity_hash(config),
                image=ImageInfo(resolution=256, channels=3, extension="jpg"),
                splits={
                    "train": Split(num_samples=12 * generation, shards=tuple(train_shards)),
                    "heldout": Split(num_samples=4 * generation, shards=tuple(heldout_shards)),
                },
                tokenizer=TokenizerInfo(file=TOKENIZER_FILE, sha256=hashlib.sha256(model).hexdigest(), num_pieces=300),
                counts=Counts(read=kept + sum(dropped.values()), kept=kept, dropped=dropped),
                action="prep" if generation == 1 else "grow",
                base=generation - 1 or None,
                inputs=config.inputs,
            )
            manifest.dump(storage)
            if stats:
                write_stats(storage, generation, 16)
        return Made(url=str(tmp_path / name), storage=storage, manifest=manifest, captions=captions)

    return make
