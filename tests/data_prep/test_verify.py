"""`jetway verify` finds every kind of damage and names the place."""

import json
from pathlib import Path

import pytest

from data_prep.schema import ShardIndex, manifest_path
from data_prep.storage import open_storage
from data_prep.verify import main


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
