"""Parts to shards: balance, splits, the same bytes every time, damage found."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_prep import metadata
from data_prep import shard as shard_module
from data_prep.config import PrepConfig
from data_prep.part import is_heldout, write_part
from data_prep.plan import make_plan
from data_prep.schema import ShardIndex
from data_prep.shard import PartCounts, Piece, plan_shards, shard_name, write_shard
from data_prep.storage import open_storage
from data_prep.task_samples import Job
from tests.data_prep.conftest import files_below, make_shards, small_config

JOB = Job(generation=1)


def counts(number: int, kept: int, heldout: int) -> PartCounts:
    return PartCounts(name=f"part-{number}", num_train=kept - heldout, num_heldout=heldout)


def lasting(files: dict[str, bytes]) -> dict[str, bytes]:
    """What is left once the parts, whose names are random, are gone."""
    return {path: data for path, data in files.items() if not path.startswith(("parts/", "stats/"))}


def test_shards_are_equally_full_whatever_was_dropped() -> None:
    parts = [counts(0, 8, 2), counts(1, 0, 0), counts(2, 3, 0), counts(3, 8, 3), counts(4, 8, 1)]
    shards = plan_shards(parts, PrepConfig(samples_per_shard=8), 1, has_verdicts=False)
    sizes = {shard.name: sum(piece.stop - piece.start for piece in shard.pieces) for shard in shards}
    assert sizes == {"train-000000": 8, "train-000001": 8, "train-000002": 5, "heldout-000000": 6}
    assert shards[0].pieces == (Piece(part="part-0", start=0, stop=6), Piece(part="part-2", start=0, stop=2))
    expected = (Piece(part="part-2", start=2, stop=3), Piece(part="part-3", start=0, stop=5), Piece(part="part-4", start=0, stop=2))
    assert shards[1].pieces == expected


def test_everything_goes_to_train_when_all_would_be_held_out() -> None:
    (shard,) = plan_shards([counts(0, 1, 1)], PrepConfig(), 1, has_verdicts=False)
    assert (shard.name, shard.is_heldout, shard.heldout_permille) == ("train-000000", False, 0)
    (later,) = plan_shards([counts(0, 1, 1)], PrepConfig(), 2, has_verdicts=False)
    assert later.is_heldout, "a later generation keeps to the rule of the first"


def test_shards_of_later_generations_have_names_of_their_own() -> None:
    assert shard_name("train", 1, 3) == "train-000003"
    assert shard_name("heldout", 12, 3) == "heldout-g0012-000003"


def test_the_same_input_gives_the_same_bytes(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(20)
    (folder / "p003.png").write_text("no image")
    outputs = [tmp_path / "a", tmp_path / "b"]
    for output in outputs:
        make_shards(small_config(folder, output))
    first, second = (lasting(files_below(output)) for output in outputs)
    assert first == second
    failures = [json.loads(line) for path, data in first.items() if path.startswith("ledger/") for line in data.splitlines()]
    assert [(entry["source"], entry["key"], entry["reason"]) for entry in failures] == [("raw/p003.png", "0000000003", "not_an_image")]


def test_an_object_store_gets_the_same_objects_as_a_folder(make_folder: Callable[..., Path], tmp_path: Path, s3_url: str) -> None:
    config = small_config(make_folder(10), tmp_path / "local")
    make_shards(config)
    make_shards(replace(config, output=f"{s3_url}/process"))
    storage = open_storage(f"{s3_url}/process")
    assert lasting({path: storage.read_bytes(path) for path in storage.list()}) == lasting(files_below(tmp_path / "local"))


def test_sidecars_describe_the_samples_of_their_shard(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    infos = make_shards(small_config(make_folder(20), tmp_path / "out"))
    storage = open_storage(tmp_path / "out")
    for info in infos:
        index = ShardIndex.load(storage, info.name, sha256=info.index_sha256)
        table = metadata.load(storage, info.name, sha256=info.metadata_sha256)
        assert [key.encode() for key in table["key"].to_pylist()] == index.keys.tolist()
        assert b"".join(table["sha256"].to_pylist()) == index.sha256.tobytes()
        assert all(caption.startswith("a soft picture number") for caption in table["caption"].to_pylist())


def test_splits_never_share_a_shard_and_copies_stay_together(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(20)
    for number in range(20):
        (folder / f"copy{number:03d}.png").write_bytes((folder / f"p{number:03d}.png").read_bytes())
        (folder / f"copy{number:03d}.txt").write_text("a copy")
    make_shards(small_config(folder, tmp_path / "out"))
    seen: dict[str, set[bytes]] = {"train": set(), "heldout": set()}
    keys: list[bytes] = []
    for path in sorted((tmp_path / "out" / "shards").glob("*.npz")):
        index = ShardIndex.from_bytes(path.read_bytes())
        split = path.name.split("-")[0]
        assert (is_heldout(index.sha256, 200) == (split == "heldout")).all()
        seen[split] |= {row.tobytes() for row in index.sha256}
        keys += index.keys.tolist()
    assert len(keys) == len(set(keys)) == 40
    assert seen["heldout"]
    assert not seen["train"] & seen["heldout"]


def test_a_damaged_part_is_found_before_it_becomes_a_shard(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(make_folder(8), tmp_path / "out")
    (task,) = make_plan(config).tasks
    record, _ = write_part(config, JOB, task)
    path = tmp_path / "out" / "parts" / f"{record.name}.tar"
    data = bytearray(path.read_bytes())
    index = ShardIndex.load(open_storage(tmp_path / "out"), record.name, folder="parts")
    row = int(np.flatnonzero(~is_heldout(index.sha256, 200))[0])
    data[int(index.offsets[row, 0]) + 40] ^= 4
    path.write_bytes(data)
    part = PartCounts(name=record.name, num_train=record.kept - record.num_heldout, num_heldout=record.num_heldout)
    damaged = next(shard for shard in plan_shards([part], config, 1, has_verdicts=False) if not shard.is_heldout)
    with pytest.raises(UserError, match=f"{record.name}.tar is damaged"):
        write_shard(config, JOB, damaged)


def test_however_much_of_a_part_is_read_at_once_the_shards_are_the_same(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(20)
    (folder / "p003.png").write_text("no image")
    for name, gap, size in (("whole", 2**20, 2**26), ("one", 0, 1), ("some", 4000, 9000)):
        monkeypatch.setattr(shard_module, "GAP_BYTES", gap)
        monkeypatch.setattr(shard_module, "READ_BYTES", size)
        make_shards(small_config(folder, tmp_path / name, keep_dropped=True))
    whole, one, some = (lasting(files_below(tmp_path / name)) for name in ("whole", "one", "some"))
    assert "dropped/000001/part-000000.tar" in whole
    assert whole == one == some
    assert not list((tmp_path / "one" / ".tmp").iterdir())
