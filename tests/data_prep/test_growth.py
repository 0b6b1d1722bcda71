"""Generations by growth: what the inputs gain becomes the next generation, and nothing that is published changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.config import DedupConfig, ImageConfig
from data_prep.prepare import prepare
from data_prep.schema import Manifest, ShardIndex, generations
from data_prep.storage import LocalStorage, open_storage
from tests.data_prep.conftest import encoded, files_below, small_config, smooth_pixels

pytestmark = pytest.mark.usefixtures("ray_cluster")


def keys_of(manifest: Manifest, folder: Path) -> list[int]:
    storage = open_storage(folder)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return sorted(int(key) for shard in shards for key in ShardIndex.load(storage, shard.name, sha256=shard.index_sha256).keys)


def write_table(path: Path, folder: Path, count: int) -> None:
    path.write_text("".join(json.dumps({"image": f"{folder}/p{i:03d}.png", "caption": f"c{i}"}) + "\n" for i in range(count)))


def test_new_files_of_a_folder_become_a_generation_and_nothing_else_changes(data_set: Path, tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    before = files_below(data_set)
    make_folder(3, first=100)
    for name in ("a0", "a1"):  # these sort before all others
        (tmp_path / "raw" / f"{name}.png").write_bytes(encoded(smooth_pixels(20, 24, seed=900 + int(name[1]))))
        (tmp_path / "raw" / f"{name}.txt").write_text("first by name")
    config = small_config(tmp_path / "raw", data_set)
    manifest, worked = prepare(config)
    assert worked
    assert (manifest.generation, manifest.action, manifest.base, manifest.num_planned) == (2, "grow", 1, 35)
    assert manifest.counts.read == manifest.counts.kept == 35
    assert keys_of(manifest, data_set) == list(range(35))
    after = files_below(data_set)
    assert {path: after[path] for path in before} == before
    assert manifest.splits["train"].shards[0].name == "train-000000"
    assert manifest.splits["train"].shards[-1].name == "train-g0002-000000"
    assert manifest.tokenizer == Manifest.load(open_storage(data_set), 1).tokenizer
    assert prepare(config) == (manifest, False)
    assert files_below(data_set) == after


def test_rows_added_at_the_end_of_a_table_are_found(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, table = make_folder(20), tmp_path / "pairs.jsonl"
    write_table(table, folder, 11)
    config = small_config(table, tmp_path / "set")
    assert prepare(config)[0].counts.read == 11
    write_table(table, folder, 20)
    manifest, _ = prepare(config)
    assert (manifest.counts.read, manifest.counts.kept) == (20, 20)
    assert keys_of(manifest, tmp_path / "set") == list(range(20))
    captions = {}
    for path in (tmp_path / "set" / "metadata").glob("*.parquet"):
        import pyarrow.parquet as pq

        captions.update({row["key"]: row["caption"] for row in pq.read_table(path).to_pylist()})
    assert captions == {f"{i:010d}": f"c{i}" for i in range(20)}


def test_growth_is_the_same_whether_the_input_came_at_once_or_is_named_anew(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    first, second = make_folder(9, name="one"), make_folder(9, name="two", first=50)
    config = small_config(first, tmp_path / "set")
    prepare(config)
    manifest, _ = prepare(replace(config, inputs=(str(second),)))
    assert manifest.inputs == (str(first), str(second))
    assert manifest.counts.read == 18
    assert prepare(replace(config, inputs=(str(first), str(second))))[1] is False


@pytest.mark.parametrize("change", ["replaced", "shortened"])
def test_a_table_that_did_not_just_grow_is_refused(make_folder: Callable[..., Path], tmp_path: Path, change: str) -> None:
    folder, table = make_folder(12), tmp_path / "pairs.jsonl"
    write_table(table, folder, 10)
    config = small_config(table, tmp_path / "set")
    prepare(config)
    before = files_below(tmp_path / "set")
    if change == "replaced":
        table.write_text(table.read_text().replace("c1", "another"))
    else:
        write_table(table, folder, 8)
    with pytest.raises(UserError, match="has been replaced" if change == "replaced" else "has been replaced|fewer samples"):
        prepare(config)
    assert files_below(tmp_path / "set") == before


def test_an_older_generation_can_be_continued(data_set: Path, tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    make_folder(3, first=100)
    config = small_config(tmp_path / "raw", data_set)
    prepare(config)
    make_folder(2, first=200)
    manifest, _ = prepare(config, from_generation=1)
    assert (manifest.generation, manifest.base, manifest.counts.read) == (3, 1, 35)
    assert not any("g0002" in shard.name for split in manifest.splits.values() for shard in split.shards)
    assert generations(open_storage(data_set)) == [1, 2, 3]
    assert keys_of(manifest, data_set) == [*range(30), *range(33, 38)], "generation 2 gave the keys between to other samples"


def test_a_growth_with_changed_settings_is_refused(data_set: Path, tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    make_folder(3, first=100)
    config = small_config(tmp_path / "raw", data_set, image=ImageConfig(resolution=8, format="png"))
    with pytest.raises(UserError, match=r"image\.resolution: 16 -> 8"):
        prepare(config)
    assert generations(LocalStorage(data_set)) == [1]


def test_duplicates_of_published_samples_are_dropped_from_the_new_generation(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(10)
    config = small_config(folder, tmp_path / "set", dedup=DedupConfig(exact=True))
    prepare(config)
    before = files_below(tmp_path / "set")
    for number in range(4):
        (folder / f"q{number}.png").write_bytes((folder / f"p{number:03d}.png").read_bytes())
        (folder / f"q{number}.txt").write_text("seen before")
    make_folder(1, first=500)
    manifest, _ = prepare(config)
    assert (manifest.counts.read, manifest.counts.kept, manifest.counts.dropped) == (15, 11, {"duplicate": 4})
    after = files_below(tmp_path / "set")
    assert {path: after[path] for path in before} == before
    listed = [json.loads(line) for line in after["ledger/000002/failures-000000.jsonl"].splitlines()]
    assert [(entry["reason"], Path(entry["source"]).name) for entry in listed] == [("duplicate", f"q{i}.png") for i in range(4)]


def test_a_data_set_older_than_a_setting_can_be_continued(data_set: Path, tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    """What a manifest does not name had no effect, which is what the default stands for."""
    path = data_set / "manifests" / "000001.json"
    values = json.loads(path.read_text())
    del values["config"]["limits"]["max_decode_bytes"], values["config"]["dedup"]
    path.write_text(json.dumps(values))
    make_folder(2, first=100)
    config = small_config(tmp_path / "raw", data_set)
    with pytest.raises(UserError, match=r"dedup\.exact: False -> True"):
        prepare(replace(config, dedup=DedupConfig(exact=True)))
    assert prepare(config)[0].counts.read == 32
