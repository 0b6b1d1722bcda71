"""`jetway verify` finds every kind of damage and names the place."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep import metadata
from data_prep.generations import main as generations
from data_prep.schema import Manifest, ShardIndex, manifest_path, write_lineage
from data_prep.storage import Storage, open_storage
from data_prep.takedown import main as takedown
from data_prep.tombstones import Hits, TombstoneFile, tombstones_path
from data_prep.verify import main
from tests.data_prep.history import facts, write_generation


def spoil(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 8
    path.write_bytes(data)


def test_a_good_data_set_passes(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data_set)]) == 0
    assert "30 samples: all checksums agree" in capsys.readouterr().out


def test_one_flipped_bit_is_found_and_its_member_named(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = ShardIndex.load(open_storage(data_set), "train-000001")
    for column, extension in enumerate(("png", "txt", "json")):
        spoil(data_set / "shards" / "train-000001.tar", int(index.offsets[2, column]) + 1)
        assert main([str(data_set)]) == 1
        captured = capsys.readouterr()
        assert f"shards/train-000001.tar: member {index.keys[2].decode()}.{extension} is damaged" in captured.out + captured.err
        spoil(data_set / "shards" / "train-000001.tar", int(index.offsets[2, column]) + 1)
    assert main([str(data_set)]) == 0


@pytest.mark.parametrize("damage", ["header", "truncated", "missing", "swapped", "index", "no index", "tokenizer", "no tokenizer", "counts"])
def test_every_other_damage_is_found_and_the_file_named(data_set: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    shards = data_set / "shards"
    named = "shards/train-000000.tar"
    if damage == "header":
        spoil(shards / "train-000000.tar", 3)
    elif damage == "truncated":
        (shards / "train-000000.tar").write_bytes((shards / "train-000000.tar").read_bytes()[:4000])
    elif damage == "missing":
        (shards / "train-000000.tar").unlink()
    elif damage == "swapped":
        first, second = (shards / f"train-00000{i}.tar" for i in range(2))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif damage == "index":
        named = "shards/train-000000.idx.npz"
        spoil(shards / "train-000000.idx.npz", 300)
    elif damage == "no index":
        named = "shards/train-000000.idx.npz"
        (shards / "train-000000.idx.npz").unlink()
    elif damage == "tokenizer":
        named = "tokenizer.model"
        spoil(data_set / "tokenizer.model", 50)
    elif damage == "no tokenizer":
        named = "tokenizer.model: missing"
        (data_set / "tokenizer.model").unlink()
    else:
        named = "manifest: "
        path = data_set / manifest_path(1)
        values = json.loads(path.read_text())
        values["counts"]["kept"] += 1
        path.write_text(json.dumps(values))
    assert main([str(data_set)]) == 1
    captured = capsys.readouterr()
    assert named in captured.out + captured.err


def test_dry_run_reads_no_shard(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data_set / "shards" / "train-000000.tar").unlink()
    assert main([str(data_set), "--dry-run"]) == 0
    assert "would read 5 shards" in capsys.readouterr().out


def findings(storage: Storage, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What `jetway verify` says; empty if everything agrees."""
    capsys.readouterr()
    code = main([storage.url, *arguments])
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if line.split(":")[0].startswith(("shards/", "metadata/", "man", "tomb"))]
    assert code == (1 if lines else 0), captured
    return lines


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Two generations with sidecars, by hand."""
    write_generation(tmp_path / "history", range(30))
    write_generation(tmp_path / "history", range(40, 52))
    return open_storage(tmp_path / "history")


def republish(storage: Storage, **changes: Any) -> None:
    """The newest manifest with other values, in its place."""
    manifest = replace(Manifest.load(storage), **changes)
    storage.put_bytes(manifest_path(manifest.generation), manifest.to_bytes())


def with_first_shard(storage: Storage, **changes: Any) -> dict[str, Any]:
    """The splits of the newest manifest, with other values for the first training shard."""
    splits = dict(Manifest.load(storage).splits)
    first, *others = splits["train"].shards
    splits["train"] = replace(splits["train"], shards=(replace(first, **changes), *others))
    return splits


def test_a_history_with_takedowns_compaction_and_rollback_passes(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    takedown([storage.url, "--key", facts(3).key, "--key", facts(41).key, "--url", "https://nowhere.example/"])
    generations([storage.url, "compact"])
    generations([storage.url, "rollback", "1"])
    for generation in (1, 2, 3, 4):
        assert findings(storage, capsys, "--generation", str(generation)) == []
    generations([storage.url, "compact", "--delete-old", "--yes"])
    assert findings(storage, capsys) == [], "takedowns may name shards of generations that were deleted"


@pytest.mark.parametrize("width", [16, 23])
def test_pictures_of_any_shape_are_measured_by_their_shorter_side(tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_generation(tmp_path, range(12), width=width)
    storage = open_storage(tmp_path)
    assert findings(storage, capsys) == []
    for image in (replace(manifest.image, resolution=15), replace(manifest.image, channels=1)):
        republish(storage, image=image)
        lines = findings(storage, capsys)
        assert len(lines) == 12
        assert f"is (16, {width}, 3), the manifest says {image.resolution} pixels {'square' if width == 16 else 'on the shorter side'}" in lines[0]
    if width != 16:
        republish(storage, image=replace(manifest.image, resize_mode="center_crop"))
        assert len(findings(storage, capsys)) == 12


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated", "rows", "key", "sha256", "columns"])
def test_a_sidecar_that_does_not_fit_is_named(storage: Storage, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = "metadata/train-000000.parquet"
    rows = [facts(int(key)) for key in ShardIndex.load(storage, "train-000000").keys.tolist()]
    data = storage.read_bytes(path)
    if damage == "missing":
        storage.delete(path)
    elif damage == "flipped":
        storage.put_bytes(path, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "truncated":
        storage.put_bytes(path, data[:100])
    elif damage == "columns":
        digest = metadata.dump(storage, "train-000000", metadata.table_of(rows).drop_columns(["phash"]))
        republish(storage, splits=with_first_shard(storage, metadata_sha256=digest))
    else:
        rows[4] = {"rows": rows[4], "key": replace(rows[4], key="0000000999"), "sha256": replace(rows[4], sha256=bytes(32))}[damage]
        table = metadata.table_of(rows[:-1] if damage == "rows" else rows)
        republish(storage, splits=with_first_shard(storage, metadata_sha256=metadata.dump(storage, "train-000000", table)))
    lines = findings(storage, capsys)
    assert lines
    assert all(line.startswith(f"{path}: ") for line in lines)
    expected = {"missing": "missing", "rows": "7 rows, the index has 8", "key": "row 4 has another key", "sha256": "row 4 has another sha256"}
    assert expected.get(damage, "") in lines[0]


def takedown_file(number: int, shard: str, row: int, key: str) -> TombstoneFile:
    return TombstoneFile(number=number, reason="", rules_sha256="", generations=(1, 2), shards={shard: Hits(rows=(row,), keys=(key,))})


@pytest.mark.parametrize("case", ["row", "key", "shard", "gap", "damaged", "rules", "lengths"])
def test_a_takedown_that_does_not_fit_is_named(storage: Storage, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    takedown([storage.url, "--key", facts(3).key])
    key = ShardIndex.load(storage, "train-000000").keys[0].decode()
    files = {
        "row": takedown_file(2, "train-000000", 8, key),
        "key": takedown_file(2, "train-000000", 1, key),
        "shard": takedown_file(2, "train-000999", 0, key),
        "gap": takedown_file(3, "train-000000", 0, key),
        "lengths": replace(takedown_file(2, "train-000000", 0, key), shards={"train-000000": Hits(rows=(0, 1), keys=(key,))}),
    }
    if case in files:
        storage.put_bytes(tombstones_path(files[case].number), files[case].to_bytes())
    elif case == "damaged":
        storage.put_bytes(tombstones_path(1), storage.read_bytes(tombstones_path(1)).replace(b"[3]", b"[4]").replace(b'"rows": [', b'"rows": [1'))
    else:
        storage.delete(next(path for path in storage.list("tombstones/") if "rules" in path))
    lines = findings(storage, capsys)
    assert len(lines) == 1
    expected = {
        "row": "tombstones/000002.json: train-000000 does not have",
        "key": f"tombstones/000002.json: train-000000: sample 1 is {facts(int(ShardIndex.load(storage, 'train-000000').keys[1])).key}, not {key}",
        "shard": "tombstones/000002.json: train-000999 is a shard of no generation",
        "gap": "tombstones/000002.json is missing",
        "damaged": "tombstones/000001.json is damaged",
        "rules": "is missing",
        "lengths": "tombstones/000002.json: train-000000 does not have",
    }
    assert expected[case] in lines[0]


def test_a_generation_must_continue_one_that_is_there_and_older(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    republish(storage, base=2)
    assert findings(storage, capsys) == ["manifests/000002.json: continues generation 2, which is not an older one"]
    republish(storage, base=1)
    storage.delete(manifest_path(1))
    assert findings(storage, capsys) == ["manifests/000002.json: continues generation 1, which is missing"]
    write_lineage(storage, {1: None})
    assert findings(storage, capsys) == []
    storage.put_bytes("manifests/lineage.json", b"half")
    (line,) = findings(storage, capsys)
    assert line.startswith("manifests/lineage.json: ")


def test_keys_must_not_be_given_twice(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    republish(storage, num_planned=51)
    assert findings(storage, capsys) == [
        "shards/train-g0002-000001.idx.npz: key 0000000051, but the manifest has numbered 51 samples only: a later one would get the same key"
    ]
    first = replace(Manifest.load(storage, 1), num_planned=1000)
    storage.put_bytes(manifest_path(1), first.to_bytes())
    republish(storage, num_planned=60)
    assert findings(storage, capsys) == ["manifests/000002.json: has numbered 60 samples, generation 1 1000: keys would be given twice"]


def test_a_manifest_must_keep_as_many_samples_as_its_splits(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    counts = Manifest.load(storage).counts
    republish(storage, counts=replace(counts, read=counts.read + 1, kept=counts.kept + 1))
    assert findings(storage, capsys) == [f"manifest: {counts.kept + 1} samples kept, but {counts.kept} in the splits"]
