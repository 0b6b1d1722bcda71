"""The whole of `jetway prep` on a real Ray: what comes out, reruns, refusals, bad input."""

import json
import logging
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.config import DedupConfig, ImageConfig, TokenizerConfig
from data_prep.prepare import prepare
from data_prep.schema import Manifest, ShardIndex, generations
from data_prep.storage import LocalStorage, open_storage
from data_prep.tokenizer import load_tokenizer
from tests.data_prep.conftest import encoded, files_below, small_config, smooth_pixels

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_data_set_has_the_promised_layout(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(30)
    (folder / "p004.png").write_text("no image")
    manifest, worked = prepare(small_config(folder, tmp_path / "set"))
    storage = open_storage(tmp_path / "set")
    assert worked
    assert Manifest.load(storage) == manifest
    assert (manifest.counts.read, manifest.counts.kept, manifest.counts.dropped) == (30, 29, {"not_an_image": 1})
    assert sum(split.num_samples for split in manifest.splits.values()) == 29
    names = [shard.name for split in manifest.splits.values() for shard in split.shards]
    expected = {"plans/000001.json", "tokenizer.model", "manifests/000001.json", "ledger/000001/failures-000000.jsonl"}
    for name in names:
        expected |= {f"shards/{name}.tar", f"shards/{name}.idx.npz", f"metadata/{name}.parquet"}
    assert set(files_below(tmp_path / "set")) == expected
    for split in manifest.splits.values():
        assert all(shard.num_samples == 8 for shard in split.shards[:-1])
        for shard in split.shards:
            ShardIndex.load(storage, shard.name, sha256=shard.index_sha256)
            with tarfile.open(tmp_path / "set" / "shards" / f"{shard.name}.tar") as archive:
                assert len(archive.getnames()) == 3 * shard.num_samples
    processor = load_tokenizer(storage, manifest)
    assert processor.GetPieceSize() == manifest.tokenizer.num_pieces


def test_rerun_of_a_finished_job_touches_nothing(data_set: Path, tmp_path: Path) -> None:
    before = {path: os.stat(path).st_mtime_ns for path in data_set.rglob("*")}
    manifest, worked = prepare(small_config(tmp_path / "raw", data_set))
    assert not worked
    assert manifest == Manifest.load(open_storage(data_set))
    assert {path: os.stat(path).st_mtime_ns for path in data_set.rglob("*") if path.is_file()} == {p: t for p, t in before.items() if p.is_file()}


def test_changed_settings_are_refused_with_the_difference(data_set: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "raw", data_set)
    with pytest.raises(UserError, match=r"image\.resolution: 16 -> 32"):
        prepare(replace(config, image=ImageConfig(resolution=32, format="png")))
    assert prepare(replace(config, ray=replace(config.ray, max_in_flight=1)))[1] is False


def test_result_does_not_depend_on_how_many_tasks_run_at_once(data_set: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "raw", tmp_path / "other")
    prepare(replace(config, ray=replace(config.ray, max_in_flight=1)))
    assert files_below(tmp_path / "other") == files_below(data_set)


def test_a_folder_of_one_image_works_and_says_what_is_missing(
    make_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        manifest, _ = prepare(small_config(make_folder(1), tmp_path / "set"))
    assert manifest.splits["train"].num_samples == 1
    assert manifest.splits["heldout"].num_samples == 0
    assert "held-out split is empty" in caplog.text
    assert manifest.tokenizer.num_pieces < 300
    assert f"model.text.num_pieces={manifest.tokenizer.num_pieces}" in caplog.text


def test_an_empty_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(UserError, match="no samples"):
        prepare(small_config(tmp_path / "raw", tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_only_corrupt_images_publish_nothing_and_a_mended_input_starts_afresh(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(9)
    good = {path: path.read_bytes() for path in folder.glob("*.png")}
    for path in good:
        path.write_bytes(path.read_bytes()[:100])
    config = small_config(folder, tmp_path / "set")
    with pytest.raises(UserError, match="9 x truncated"):
        prepare(config)
    left = files_below(tmp_path / "set")
    assert left
    assert all(name.startswith("ledger/") for name in left)
    for path, data in good.items():
        path.write_bytes(data)
    manifest, _ = prepare(config)
    assert manifest.counts.kept == 9
    assert not any(name.startswith("ledger/") for name in files_below(tmp_path / "set"))


def test_a_data_set_can_be_made_from_the_tars_of_another(data_set: Path, tmp_path: Path) -> None:
    manifest, _ = prepare(small_config(data_set / "shards", tmp_path / "again"))
    before = Manifest.load(open_storage(data_set))
    assert manifest.counts.kept == before.counts.kept
    assert manifest.splits["heldout"].num_samples > 0


def test_sets_without_captions_still_get_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(4):
        (tmp_path / "raw" / f"{number}.png").write_bytes(encoded(smooth_pixels(20, 20, number)))
        (tmp_path / "raw" / f"{number}.json").write_text(json.dumps({"label": number}))
    config = small_config(tmp_path / "raw", tmp_path / "set", missing_caption="empty")
    manifest, _ = prepare(config)
    processor = load_tokenizer(open_storage(tmp_path / "set"), manifest)
    assert processor.DecodeIds(processor.EncodeAsIds("any text")) == "any text"


def test_a_given_tokenizer_is_copied_and_a_bad_one_refused(data_set: Path, tmp_path: Path) -> None:
    given = TokenizerConfig(model_file=str(data_set / "tokenizer.model"))
    manifest, _ = prepare(small_config(tmp_path / "raw", tmp_path / "with", tokenizer=given))
    assert manifest.tokenizer == Manifest.load(open_storage(data_set)).tokenizer
    bad = TokenizerConfig(model_file=str(data_set / "plans" / "000001.json"))
    with pytest.raises(UserError, match="not a SentencePiece model"):
        prepare(small_config(tmp_path / "raw", tmp_path / "without", tokenizer=bad))
    assert not (tmp_path / "without").exists()  # found out before the work, not after it


def test_tokenizer_settings_may_be_mended_until_the_data_set_is_published(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(make_folder(12), tmp_path / "set", tokenizer=TokenizerConfig(vocab_size=260))
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size"):
        prepare(config)
    parts = files_below(tmp_path / "set")
    assert any(name.startswith("parts/") for name in parts)
    with pytest.raises(UserError, match=r"image\.resolution: 16 -> 32"):
        prepare(replace(config, image=ImageConfig(resolution=32, format="png")))
    mended = replace(config, tokenizer=TokenizerConfig(vocab_size=300))
    prepare(mended)
    prepare(replace(mended, output=str(tmp_path / "whole")))
    assert files_below(tmp_path / "set") == files_below(tmp_path / "whole")
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: 300 -> 400"):
        prepare(replace(config, tokenizer=TokenizerConfig(vocab_size=400)))


def test_a_second_run_at_the_same_time_is_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "set").mkdir()
    descriptor = os.open(tmp_path / "set", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another run is writing"):
            prepare(small_config(make_folder(2), tmp_path / "set"))
    finally:
        os.close(descriptor)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_one_message_and_the_run_can_go_on_later(make_folder: Callable[..., Path], tmp_path: Path, tiny_disk: Path) -> None:
    config = small_config(make_folder(60), tiny_disk / "set")
    with pytest.raises(UserError, match="no space left on the device"):
        prepare(config)
    with pytest.raises(UserError, match="half-written"):
        Manifest.load(open_storage(tiny_disk / "set"))
    for path in LocalStorage(tiny_disk / "set").list("parts/part-"):
        if path.endswith(".tar"):
            with tarfile.open(tiny_disk / "set" / path) as archive:
                assert archive.getnames()
    subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)
    prepare(config)
    prepare(replace(config, output=str(tmp_path / "whole")))
    assert files_below(tiny_disk / "set") == files_below(tmp_path / "whole")


def test_an_input_that_is_all_evaluation_set_makes_no_data_set(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(4)
    config = small_config(folder, tmp_path / "out", dedup=DedupConfig(evaluation=(str(folder),)))
    for _ in range(2):
        with pytest.raises(UserError, match="4 x eval_image"):
            prepare(config)
    assert generations(LocalStorage(tmp_path / "out")) == []
    assert len((tmp_path / "out" / "ledger" / "000001" / "failures-000000.jsonl").read_text().splitlines()) == 4
