"""One task as a plain function: what a sample becomes, what is dropped, the numbering, a full disk."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import ledger, metadata
from data_prep.config import FilterConfig, LimitConfig, PrepConfig
from data_prep.part import PartRecord, failures_path, is_heldout, measure, record_path, write_part
from data_prep.plan import make_plan
from data_prep.schema import ShardIndex, tar_path
from data_prep.storage import LocalStorage, open_storage
from data_prep.task_samples import Job, clean_caption
from tests.data_prep.conftest import encoded, files_below, small_config, smooth_pixels

JOB = Job(generation=1)


def write_only_part(config: PrepConfig, job: Job = JOB) -> PartRecord:
    (task,) = make_plan(config).tasks
    return write_part(config, job, task)[0]


def _make(config: PrepConfig) -> Path:
    write_only_part(config)
    return Path(config.output)


def failures_of(config: PrepConfig, record: PartRecord) -> list[tuple[int, str]]:
    data = open_storage(config.output).read_bytes(failures_path(record.name))
    return [(failure.number, failure.reason) for failure in ledger.from_bytes(data, "the ledger")]


def test_split_depends_on_content_only_and_has_the_asked_size() -> None:
    digests = np.frombuffer(b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(20_000)), np.uint8).reshape(-1, 32)
    heldout = is_heldout(digests, 100)
    assert 0.09 < heldout.mean() < 0.11
    np.testing.assert_array_equal(is_heldout(digests[::-1], 100), heldout[::-1])
    assert not (is_heldout(digests, 50) & ~heldout).any()
    assert not is_heldout(digests, 0).any()


def test_captions_keep_their_words() -> None:
    assert clean_caption("  a\tb\n\nc d\u3000e ") == "a b c d e"
    assert clean_caption("Ünïcode 😀 עברית") == "Ünïcode 😀 עברית"
    assert clean_caption("bad \ud800 half") == "bad ? half"


def test_json_and_sidecar_of_a_sample(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = encoded(smooth_pixels(30, 40), "JPEG", quality=80)
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    (tmp_path / "in" / "a.txt").write_text(" two  words")
    (tmp_path / "in" / "a.json").write_text('{"label": 3, "license": "mine"}')
    config = small_config(tmp_path / "in", tmp_path / "out")
    record = write_only_part(config)
    with tarfile.open(tmp_path / "out" / tar_path(record.name, "parts")) as archive:
        members = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    assert members["0000000000.txt"] == b"two words"
    values = json.loads(members["0000000000.json"])
    facts = metadata.load(open_storage(config.output), record.name, folder="parts").to_pylist()[0]
    assert values.pop("phash") == f"{facts['phash']:016x}"
    assert values == {
        "key": "0000000000",
        "caption": "two words",
        "source": "in/a.jpg",
        "width": 40,
        "height": 30,
        "format": "jpeg",
        "jpeg_quality": 80,
        "sha256": hashlib.sha256(data).hexdigest(),
        "label": 3,
        "extra": {"license": "mine"},
    }
    assert {name: facts[name] for name in ("key", "caption", "width", "jpeg_quality", "num_bytes", "sha256")} == {
        "key": "0000000000",
        "caption": "two words",
        "width": 40,
        "jpeg_quality": 80,
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).digest(),
    }


def test_missing_captions_are_dropped_or_left_empty(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(2)
    (folder / "p000.txt").write_text(" \n")
    config = small_config(folder, tmp_path / "out")
    assert failures_of(config, write_only_part(config)) == [(0, "missing_caption")]
    assert write_only_part(replace(config, output=str(tmp_path / "empty"), missing_caption="empty")).kept == 2


def test_a_bad_sample_costs_only_itself(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(6)
    (folder / "p001.png").write_text("no image")
    (folder / "p003.txt").write_text("long " * 100)
    config = small_config(folder, tmp_path / "out", limits=LimitConfig(max_caption_bytes=100))
    record = write_only_part(config)
    assert (record.read, record.kept, record.dropped) == (6, 4, {"caption_too_long": 1, "not_an_image": 1})
    assert failures_of(config, record) == [(1, "not_an_image"), (3, "caption_too_long")]
    keys = ShardIndex.load(open_storage(config.output), record.name, folder="parts").keys.tolist()
    assert keys == [b"0000000000", b"0000000002", b"0000000004", b"0000000005"]


def test_takedown_rules_of_the_data_set_are_applied(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(4)
    digest = hashlib.sha256((folder / "p002.png").read_bytes()).hexdigest()
    config = small_config(folder, tmp_path / "out", keep_dropped=True)
    record = write_only_part(config, Job(generation=1, takedowns=(f"sha256 {digest}",)))
    assert failures_of(config, record) == [(2, "takedown")]
    assert not list((tmp_path / "out").rglob("*.dropped.tar")), "what must go is not kept aside"


def test_dropped_images_are_kept_on_request(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(4)
    (folder / "p002.png").write_text("no image")
    config = small_config(folder, tmp_path / "out", keep_dropped=True)
    record = write_only_part(config)
    with tarfile.open(tmp_path / "out" / "parts" / f"{record.name}.dropped.tar") as archive:
        assert archive.getnames() == ["0000000002.bin", "0000000002.txt", "0000000002.json"]
        assert archive.extractfile("0000000002.bin").read() == b"no image"  # type: ignore[union-attr]
        assert json.loads(archive.extractfile("0000000002.json").read())["reason"] == "not_an_image"  # type: ignore[union-attr]


def test_of_two_copies_of_a_task_the_first_counts_and_the_second_leaves_nothing(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(4)
    config = small_config(folder, tmp_path / "out")
    (task,) = make_plan(config).tasks
    first, _ = write_part(config, JOB, task)
    before = files_below(tmp_path / "out")
    (folder / "p001.png").write_text("the second copy finds something else")
    second, _ = write_part(config, JOB, task)
    assert second == first
    assert files_below(tmp_path / "out") == before
    assert json.loads(before[record_path(1, 0)])["kept"] == 4


def test_a_record_whose_reply_got_lost_keeps_its_part(make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_new = LocalStorage.put_new

    def put_new_without_reply(storage: LocalStorage, path: str, data: bytes) -> bool:
        put_new(storage, path, data)
        return put_new(storage, path, data)  # as an object store sees the repeated request

    monkeypatch.setattr(LocalStorage, "put_new", put_new_without_reply)
    config = small_config(make_folder(4), tmp_path / "out")
    record = write_only_part(config)
    assert (tmp_path / "out" / tar_path(record.name, "parts")).is_file()
    assert len(metadata.load(open_storage(config.output), record.name, folder="parts")) == 4


def test_a_file_name_that_is_no_utf8_costs_nothing(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(2)
    for suffix in (".png", ".txt"):
        os.rename(folder / f"p000{suffix}", os.path.join(os.fsencode(folder), b"p\xff" + suffix.encode()))
    config = small_config(folder, tmp_path / "out")
    record = write_only_part(config)
    facts = metadata.load(open_storage(config.output), record.name, folder="parts").to_pylist()
    assert [row["source"] for row in facts] == ["raw/p001.png", "raw/p?.png"]


def test_a_task_in_isolation_gives_the_same_samples(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(make_folder(3), tmp_path / "a")
    records = [write_only_part(config), write_only_part(replace(config, output=str(tmp_path / "b")), replace(JOB, is_isolated=True))]
    assert records[0].index_sha256 == records[1].index_sha256 != ""


def test_an_input_that_shrinks_after_planning_shifts_no_key(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    table = tmp_path / "pairs.jsonl"
    folder = make_folder(6)
    table.write_text("".join(json.dumps({"image": f"{folder}/p{i:03d}.png", "caption": f"c{i}"}) + "\n" for i in range(6)))
    config = small_config(table, tmp_path / "out")
    (task,) = make_plan(config).tasks
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:4]))
    record, _ = write_part(config, JOB, task)
    assert (record.read, record.kept, record.dropped) == (6, 4, {"missing_file": 2})


def test_measuring_publishes_nothing(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(5)
    (folder / "p002.png").write_text("no image")
    config = small_config(folder, tmp_path / "out", filters=FilterConfig(min_caption_words=2))
    stats, facts, num_bytes = measure(make_plan(config).tasks[0], config)
    assert (stats.read, stats.kept, dict(stats.dropped)) == (5, 4, {"not_an_image": 1})
    assert [row.key for row in facts] == ["0000000000", "0000000001", "0000000003", "0000000004"]
    assert not (tmp_path / "out").exists()
    (shard,) = _make(config).rglob("*.tar")
    assert num_bytes <= shard.stat().st_size < num_bytes + 12_000


def test_a_full_disk_stops_the_task_and_leaves_no_part(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(make_folder(8), tmp_path / "out")
    script = textwrap.dedent(
        """
        import resource, sys
        from configs.errors import UserError
        from data_prep.plan import make_plan
        from data_prep.part import write_part
        from data_prep.task_samples import Job
        from tests.data_prep.conftest import small_config
        from pathlib import Path
        config = small_config(Path(sys.argv[1]), Path(sys.argv[2]))
        (task,) = make_plan(config).tasks
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            write_part(config, Job(generation=1), task)
        except UserError as error:
            print(error)
        """
    )
    arguments: list[Any] = [sys.executable, "-c", script, config.inputs[0], config.output]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert "file size limit reached" in done.stdout, done.stderr
    assert files_below(tmp_path / "out") == {}
