"""A data set with sidecars, and with a history, written by hand through the schema's own classes: eight samples a shard, small PNGs."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep import metadata
from data_prep.config import identity, identity_hash
from data_prep.images.phash import phash
from data_prep.metadata import Facts
from data_prep.part import is_heldout
from data_prep.schema import SPLITS, TOKENIZER_FILE, Counts, ImageInfo, Manifest, ShardInfo, Split, TokenizerInfo, shard_name
from data_prep.shard_writer import Sample, ShardWriter
from data_prep.storage import Storage, open_storage
from data_prep.tokenizer import load, train
from tests.data_prep.conftest import encoded, small_config, smooth_pixels

SIDE = 16
SHARD = 8
CONFIG = identity(small_config(Path("raw"), Path("set")))


def original(number: int) -> bytes:
    """Stands for the file that sample `number` was made from."""
    return f"original {number}".encode()


def url(number: int) -> str:
    """Two hosts, one a subdomain of the other."""
    return f"https://{('example.org', 'images.example.org', 'other.net')[number % 3]}/picture-{number}.png"


@functools.cache
def facts(number: int) -> Facts:
    """The sidecar's row."""
    return Facts(
        key=f"{number:010d}",
        source=f"list.parquet#{number}",
        url=url(number),
        caption=f"a soft picture number {number}",
        width=20 + number,
        height=24,
        format="png",
        jpeg_quality=-1,
        num_bytes=len(original(number)),
        sha256=hashlib.sha256(original(number)).digest(),
        phash=phash(smooth_pixels(SIDE, SIDE, seed=number)),
    )


@functools.cache
def sample(number: int, width: int = SIDE) -> Sample:
    """The shard's members."""
    row = facts(number)
    values = {
        **{"key": row.key, "caption": row.caption, "source": row.source, "width": row.width, "height": row.height},
        **{"format": "png", "sha256": row.sha256.hex(), "label": number % 3, "extra": {"url": row.url, "license": "mine"}},
    }
    image = encoded(smooth_pixels(SIDE, width, seed=number))
    return Sample(key=row.key, image=image, txt=row.caption.encode(), json=json.dumps(values).encode(), sha256=row.sha256)


@functools.cache
def tokenizer() -> tuple[bytes, TokenizerInfo]:
    """A small SentencePiece model, and what the manifest says of it."""
    model = train([facts(number).caption for number in range(40)], small_config(Path("raw"), Path("set")).tokenizer)
    return model, TokenizerInfo(file=TOKENIZER_FILE, sha256=hashlib.sha256(model).hexdigest(), num_pieces=load(model).GetPieceSize())


def split_of(number: int) -> str:
    """By content hash, as `jetway prep` does it."""
    digest = np.frombuffer(facts(number).sha256, dtype=np.uint8).reshape(1, 32)
    return SPLITS[int(is_heldout(digest, CONFIG["heldout_permille"])[0])]


def write_shard(storage: Storage, name: str, numbers: Sequence[int], *, sidecars: bool = True, width: int = SIDE) -> ShardInfo:
    """One shard of these samples."""
    with ShardWriter(storage.scratch() / name, "png") as writer:
        for number in numbers:
            writer.add(sample(number, width))
        info = writer.publish(storage, name)
    if not sidecars:
        return info
    return replace(info, metadata_sha256=metadata.dump(storage, name, metadata.table_of([facts(number) for number in numbers])))


def write_generation(path: Path | str, numbers: Iterable[int], *, sidecars: bool = True, width: int = SIDE) -> Manifest:
    """Publishes the next generation: the newest one (if any), and these samples in shards of their own."""
    storage = open_storage(path)
    model, info = tokenizer()
    numbers = list(numbers)
    from data_prep.schema import generations

    base = Manifest.load(storage) if generations(storage) else None
    generation = 1 if base is None else base.generation + 1
    splits = {}
    for name in SPLITS:
        mine = [number for number in numbers if split_of(number) == name]
        cut = [mine[start : start + SHARD] for start in range(0, len(mine), SHARD)]
        old = base.splits[name].shards if base else ()
        new = [write_shard(storage, shard_name(name, generation, i), part, sidecars=sidecars, width=width) for i, part in enumerate(cut)]
        shards = (*old, *new)
        splits[name] = Split(num_samples=sum(shard.num_samples for shard in shards), shards=shards)
    kept = sum(split.num_samples for split in splits.values())
    dropped = {"corrupt": 2} if base is None else dict(base.counts.dropped)
    storage.put_bytes(TOKENIZER_FILE, model)
    manifest = Manifest(
        generation=generation,
        config=CONFIG,
        config_hash=identity_hash(small_config(Path("raw"), Path("set"))),
        image=ImageInfo(resolution=SIDE, channels=3, extension="png", resize_mode="center_crop" if width == SIDE else "keep_ratio"),
        splits=splits,
        tokenizer=info,
        counts=Counts(read=kept + sum(dropped.values()), kept=kept, dropped=dropped),
        action="prep" if base is None else "grow",
        base=None if base is None else base.generation,
        num_planned=max(numbers) + 1 + sum(dropped.values()),
        inputs=(*(base.inputs if base else ()), f"list-{generation}.parquet"),
    )
    manifest.dump(storage)
    return manifest


def numbers_of(manifest: Manifest, storage: Storage, split: str = "train") -> list[int]:
    """The samples of a generation in the order of its shards."""
    from data_prep.schema import ShardIndex

    found: list[int] = []
    for shard in manifest.splits[split].shards:
        found += [int(key) for key in ShardIndex.load(storage, shard.name, sha256=shard.index_sha256).keys.tolist()]
    return found
