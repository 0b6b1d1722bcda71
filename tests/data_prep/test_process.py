"""Parts and shards as plain functions: content, balance, splits, the same bytes every time."""

import hashlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from data_prep.config import PrepConfig
from data_prep.plan import make_plan
from data_prep.process import PartRecord, Piece, clean_caption, is_heldout, plan_shards, prepare_sample, write_part, write_shard
from data_prep.readers.base import RawSample
from data_prep.reasons import Drop
from data_prep.schema import ShardIndex
from data_prep.storage import open_storage
from tests.data_prep.conftest import encoded, files_below, small_config, smooth_pixels


def record(number: int, kept: int, heldout: int) -> PartRecord:
    return PartRecord(number=number, read=kept, kept=kept, num_heldout=heldout, dropped={}, index_sha256="")


def make_all(config: PrepConfig) -> None:
    parts = [write_part(config, task) for task in make_plan(config).tasks]
    for shard in plan_shards(parts, config):
        write_shard(config, shard)


def test_split_depends_on_content_only_and_has_the_asked_size() -> None:
    digests = np.frombuffer(b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(20_000)), np.uint8).reshape(-1, 32)
    heldout = is_heldout(digests, 100)
    assert 0.09 < heldout.mean() < 0.11
    np.testing.assert_array_equal(is_heldout(digests[::-1], 100), heldout[::-1])
    assert not (is_heldout(digests, 50) & ~heldout).any()
    assert not is_heldout(digests, 0).any()


def test_shards_are_equally_full_whatever_was_dropped() -> None:
    parts = [record(0, 8, 2), record(1, 0, 0), record(2, 3, 0), record(3, 8, 3), record(4, 8, 1)]
    shards = plan_shards(parts, PrepConfig(samples_per_shard=8))
    sizes = {shard.name: sum(piece.stop - piece.start for piece in shard.pieces) for shard in shards}
    assert sizes == {"train-000000": 8, "train-000001": 8, "train-000002": 5, "heldout-000000": 6}
    assert shards[0].pieces == (Piece(part=0, start=0, stop=6), Piece(part=2, start=0, stop=2))
    assert shards[1].pieces == (Piece(part=2, start=2, stop=3), Piece(part=3, start=0, stop=5), Piece(part=4, start=0, stop=2))


def test_everything_goes_to_train_when_all_would_be_held_out() -> None:
    (shard,) = plan_shards([record(0, 1, 1)], PrepConfig())
    assert (shard.name, shard.is_heldout, shard.heldout_permille) == ("train-000000", False, 0)


def test_captions_keep_their_words() -> None:
    assert clean_caption("  a\tb\n\nc d\u3000e ") == "a b c d e"
    assert clean_caption("Ünïcode 😀 עברית") == "Ünïcode 😀 עברית"
    assert clean_caption("bad \ud800 half") == "bad ? half"


def test_json_of_a_sample() -> None:
    data = encoded(smooth_pixels(30, 40), "JPEG")
    raw = RawSample(source="in/a.jpg", image=data, caption=" two  words", label=3, extra={"url": "u"})
    sample = prepare_sample(raw, "0000000007", small_config(Path("a"), Path("b")))
    assert json.loads(sample.json) == {
        "key": "0000000007",
        "caption": "two words",
        "source": "in/a.jpg",
        "width": 40,
        "height": 30,
        "format": "jpeg",
        "sha256": hashlib.sha256(data).hexdigest(),
        "label": 3,
        "extra": {"url": "u"},
    }
    assert sample.txt == b"two words"


def test_missing_captions_are_dropped_or_left_empty() -> None:
    raw = RawSample(source="a", image=encoded(smooth_pixels(30, 40)), caption=" \n")
    config = small_config(Path("a"), Path("b"))
    with pytest.raises(Drop) as caught:
        prepare_sample(raw, "k", config)
    assert caught.value.reason == "missing_caption"
    assert prepare_sample(raw, "k", replace(config, missing_caption="empty")).txt == b""


def test_the_same_task_gives_the_same_bytes(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(20)
    (folder / "p003.png").write_text("no image")
    outputs = [tmp_path / "a", tmp_path / "b"]
    for output in outputs:
        make_all(small_config(folder, output))
    first, second = (files_below(output) for output in outputs)
    assert first == second
    ledger = [json.loads(line) for path, data in first.items() if path.startswith("ledger/") for line in data.splitlines()]
    assert [(entry["source"], entry["key"], entry["reason"]) for entry in ledger] == [("raw/p003.png", "0000000003", "not_an_image")]


def test_an_object_store_gets_the_same_objects_as_a_folder(make_folder: Callable[..., Path], tmp_path: Path, s3_url: str) -> None:
    config = small_config(make_folder(10), tmp_path / "local")
    make_all(config)
    make_all(replace(config, output=f"{s3_url}/process"))
    storage = open_storage(f"{s3_url}/process")
    assert {path: storage.read_bytes(path) for path in storage.list()} == files_below(tmp_path / "local")


def test_splits_never_share_a_shard_and_copies_stay_together(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(20)
    for number in range(20):
        (folder / f"copy{number:03d}.png").write_bytes((folder / f"p{number:03d}.png").read_bytes())
        (folder / f"copy{number:03d}.txt").write_text("a copy")
    config = small_config(folder, tmp_path / "out")
    make_all(config)
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


def test_an_input_that_shrinks_after_planning_shifts_no_key(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    table = tmp_path / "pairs.jsonl"
    folder = make_folder(6)
    table.write_text("".join(json.dumps({"image": f"{folder}/p{i:03d}.png", "caption": f"c{i}"}) + "\n" for i in range(6)))
    config = small_config(table, tmp_path / "out")
    (task,) = make_plan(config).tasks
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:4]))
    result = write_part(config, task)
    assert (result.read, result.kept, result.dropped) == (6, 4, {"missing_file": 2})


def test_a_damaged_part_is_found_before_it_becomes_a_shard(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(make_folder(8), tmp_path / "out")
    parts = [write_part(config, task) for task in make_plan(config).tasks]
    path = tmp_path / "out" / "parts" / "part-000000.tar"
    data = bytearray(path.read_bytes())
    index = ShardIndex.load(open_storage(tmp_path / "out"), "part-000000", folder="parts")
    row = int(np.flatnonzero(~is_heldout(index.sha256, 200))[0])
    data[int(index.offsets[row, 0]) + 40] ^= 4
    path.write_bytes(data)
    damaged = next(shard for shard in plan_shards(parts, config) if not shard.is_heldout)
    with pytest.raises(UserError, match="part-000000.tar is damaged"):
        write_shard(config, damaged)


def test_a_full_disk_stops_the_task_and_leaves_no_part(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(make_folder(8), tmp_path / "out")
    script = textwrap.dedent(
        """
        import resource, sys
        from configs.errors import UserError
        from data_prep.plan import make_plan
        from data_prep.process import write_part
        from tests.data_prep.conftest import small_config
        from pathlib import Path
        config = small_config(Path(sys.argv[1]), Path(sys.argv[2]))
        (task,) = make_plan(config).tasks
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            write_part(config, task)
        except UserError as error:
            print(error)
        """
    )
    arguments: list[Any] = [sys.executable, "-c", script, config.inputs[0], config.output]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert "file size limit reached" in done.stdout, done.stderr
    assert files_below(tmp_path / "out") == {}
