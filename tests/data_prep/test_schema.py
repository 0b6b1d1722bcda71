"""Manifest and shard index: exact round trips, the same bytes every time, damage refused with the place named."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_prep.schema import Counts, ImageInfo, Manifest, ShardIndex, ShardInfo, Split, TokenizerInfo, generations, manifest_path
from data_prep.storage import open_storage


def make_index(num: int = 4) -> ShardIndex:
    generator = np.random.default_rng(0)
    return ShardIndex(
        keys=np.array([f"{i:010d}".encode() for i in range(num)]),
        offsets=generator.integers(0, 2**40, (num, 3)),
        sizes=generator.integers(0, 2**20, (num, 3)),
        xxh3=generator.integers(0, 2**64, (num, 3), dtype=np.uint64),
        sha256=generator.integers(0, 256, (num, 32), dtype=np.uint8),
    )


def make_manifest(**changes: object) -> Manifest:
    shard = ShardInfo(name="train-000000", num_samples=4, num_bytes=10_240, sha256="ab", index_sha256="cd")
    manifest = Manifest(
        generation=1,
        config={"image": {"resolution": 8}},
        config_hash="ff",
        image=ImageInfo(resolution=8, channels=1, extension="png"),
        splits={"train": Split(num_samples=4, shards=(shard,)), "heldout": Split()},
        tokenizer=TokenizerInfo(file="tokenizer.model", sha256="ee", num_pieces=300),
        counts=Counts(read=6, kept=4, dropped={"corrupt": 2}),
    )
    return replace(manifest, **changes)  # type: ignore[arg-type]


def test_index_round_trip_is_exact(tmp_path: Path) -> None:
    storage, index = open_storage(tmp_path), make_index()
    digest = index.dump(storage, "train-000000")
    loaded = ShardIndex.load(storage, "train-000000", sha256=digest)
    for name in ("keys", "offsets", "sizes", "xxh3", "sha256"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(index, name))
        assert getattr(loaded, name).dtype == getattr(index, name).dtype


def test_index_bytes_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_index().to_bytes()
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert make_index().to_bytes() == before


def test_index_refuses_arrays_of_other_lengths() -> None:
    index = make_index()
    with pytest.raises(ValueError, match="sizes"):
        replace(index, sizes=index.sizes[:2])


def test_damaged_index_is_refused_and_named(tmp_path: Path) -> None:
    storage, index = open_storage(tmp_path), make_index()
    digest = index.dump(storage, "train-000000")
    path = tmp_path / "shards" / "train-000000.idx.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000000\.idx\.npz is damaged"):
        ShardIndex.load(storage, "train-000000", sha256=digest)
    path.write_bytes(b"no zip at all")
    with pytest.raises(UserError, match="damaged"):
        ShardIndex.load(storage, "train-000000")
    with pytest.raises(UserError, match="is missing"):
        ShardIndex.load(storage, "train-000001")


def test_manifest_round_trip_is_exact(tmp_path: Path) -> None:
    storage, manifest = open_storage(tmp_path), make_manifest()
    assert manifest.dump(storage) == "manifests/000001.json"
    assert Manifest.load(storage) == manifest
    assert hashlib.sha256(manifest.to_bytes()).digest() == hashlib.sha256(Manifest.load(storage).to_bytes()).digest()


def test_newest_generation_is_the_default_and_any_can_be_asked_for(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for generation in (1, 2, 10):
        make_manifest(generation=generation).dump(storage)
    assert generations(storage) == [1, 2, 10]
    assert Manifest.load(storage).generation == 10
    assert Manifest.load(storage, 2).generation == 2
    with pytest.raises(UserError, match="no generation 3"):
        Manifest.load(storage, 3)


def test_generations_are_immutable(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    make_manifest().dump(storage)
    make_manifest().dump(storage)
    with pytest.raises(UserError, match="exists with other content"):
        make_manifest(config_hash="00").dump(storage)


def test_missing_and_half_written_data_sets_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no data set"):
        Manifest.load(open_storage(tmp_path / "nothing"))
    storage = open_storage(tmp_path)
    storage.put_bytes("plans/000001.json", b"{}")
    with pytest.raises(UserError, match="half-written"):
        Manifest.load(storage)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"format": "jetway-dataset/9"}', b"\xff\xfe"])
def test_damaged_manifest_is_refused_and_named(tmp_path: Path, content: bytes) -> None:
    storage = open_storage(tmp_path)
    storage.put_bytes(manifest_path(1), content)
    with pytest.raises(UserError, match=r"manifests/000001\.json is damaged or of another version"):
        Manifest.load(storage)
