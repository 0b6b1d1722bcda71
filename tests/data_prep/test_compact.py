"""A compaction removes what was taken down and nothing else, byte for byte the same however often it was killed."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_prep import compact, metadata
from data_prep.compact import delete_old, plan_compaction, plan_deletion, write_shard
from data_prep.config import RayConfig
from data_prep.generations import main
from data_prep.schema import Manifest, ShardIndex, base_of, generation_of, generations, shard_name
from data_prep.storage import Storage, open_storage
from data_prep.takedown import main as takedown
from data_prep.tombstones import load
from data_prep.verify import main as verify
from tests.data_prep.conftest import files_below
from tests.data_prep.history import facts, numbers_of, sample, write_generation

GONE = {1, 2, 9, 14, 41, 0, 7, 16}
RAY = RayConfig(num_cpus=2)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Two generations of 30 and 12 samples, some of them taken down."""
    path = tmp_path / "set"
    write_generation(path, range(30))
    write_generation(path, range(40, 52))
    takedown([str(path), *(text for number in sorted(GONE) for text in ("--key", facts(number).key))])
    return open_storage(path)


def test_only_what_was_taken_down_is_gone(storage: Storage) -> None:
    base, before = Manifest.load(storage), files_below(Path(storage.url))
    assert main([storage.url, "compact"]) == 0
    manifest, after = Manifest.load(storage), files_below(Path(storage.url))
    assert (manifest.generation, manifest.action, manifest.base) == (3, "compact", 2)
    assert {name: after[name] for name in before} == before, "older generations are untouched"
    for split in ("train", "heldout"):
        old = numbers_of(base, storage, split)
        assert sorted(numbers_of(manifest, storage, split)) == [number for number in sorted(old) if number not in GONE]
        hit = [shard for shard in base.splits[split].shards if len(load(storage).rows(shard.name))]
        kept = [shard for shard in base.splits[split].shards if shard not in hit]
        new = manifest.splits[split].shards[len(kept) :]
        assert list(manifest.splits[split].shards[: len(kept)]) == kept
        assert [shard.name for shard in new] == [shard_name(split, 3, number) for number in range(len(new))]
        assert all(shard.num_samples == 8 for shard in new[:-1]), "full but for the last"
    assert manifest.counts.dropped == {"corrupt": 2, "takedown": len(GONE)}
    assert manifest.counts.kept == base.counts.kept - len(GONE)
    assert (manifest.counts.read, manifest.num_planned, manifest.inputs) == (base.counts.read, base.num_planned, base.inputs)
    assert verify([storage.url]) == 0
    assert "compaction" not in {name.partition("/")[0] for name in after}


def test_members_index_and_sidecar_go_over_byte_for_byte(storage: Storage) -> None:
    main([storage.url, "compact"])
    manifest = Manifest.load(storage)
    new = [shard for split in manifest.splits.values() for shard in split.shards if generation_of(shard.name) == 3]
    assert len(new) >= 3
    for shard in new:
        index = ShardIndex.load(storage, shard.name, sha256=shard.index_sha256)
        numbers = [int(key) for key in index.keys.tolist()]
        with tarfile.open(Path(storage.url) / "shards" / f"{shard.name}.tar") as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        for row, number in enumerate(numbers):
            expected = sample(number)
            assert [members[f"{expected.key}.{kind}"] for kind in ("png", "txt", "json")] == [expected.image, expected.txt, expected.json]
            assert index.sha256[row].tobytes() == expected.sha256
        table = metadata.load(storage, shard.name, sha256=shard.metadata_sha256)
        assert table.to_pylist() == metadata.table_of([facts(number) for number in numbers]).to_pylist()


def test_the_ledger_lists_what_went(storage: Storage) -> None:
    main([storage.url, "compact"])
    lines = [json.loads(line) for line in storage.read_bytes("ledger/000003/failures-000000.jsonl").splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(facts(number).key for number in GONE)
    for line in lines:
        assert line["source"] == f"list.parquet#{int(line['key'])}"
        assert line["reason"] == "takedown"


def test_nothing_to_remove_is_no_new_generation(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([storage.url, "compact"]) == 0
    assert main([storage.url, "compact"]) == 0
    assert "nothing to compact" in capsys.readouterr().out
    assert generations(storage) == [1, 2, 3]
    takedown([storage.url, "--key", facts(20).key])
    assert main([storage.url, "compact"]) == 0
    assert generations(storage) == [1, 2, 3, 4]
    assert main([storage.url, "rollback", "1"]) == 0
    assert main([storage.url, "compact"]) == 0, "an old generation brings its samples back only until it is compacted too"
    assert not GONE & set(numbers_of(Manifest.load(storage), storage))


def test_a_dry_run_writes_nothing(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_below(Path(storage.url))
    assert main([storage.url, "compact", "--delete-old", "--dry-run"]) == 0
    assert f"generation 2 -> 3: {len(GONE)} samples go" in capsys.readouterr().out
    assert files_below(Path(storage.url)) == before


def test_a_data_set_without_sidecars_stays_one(tmp_path: Path) -> None:
    write_generation(tmp_path, range(30), sidecars=False)
    takedown([str(tmp_path), "--key", facts(3).key])
    assert main([str(tmp_path), "compact"]) == 0
    storage = open_storage(tmp_path)
    assert 3 not in numbers_of(Manifest.load(storage), storage)
    assert storage.list("metadata/") == []
    assert verify([str(tmp_path)]) == 0


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_may_vanish_but_not_the_data_set(tmp_path: Path, split: str) -> None:
    manifest = write_generation(tmp_path, range(12))
    storage = open_storage(tmp_path)
    for name in (split, {"train": "heldout", "heldout": "train"}[split]):
        takedown([str(tmp_path), *(text for number in numbers_of(manifest, storage, name) for text in ("--key", facts(number).key))])
        if name == split:
            plan = plan_compaction(manifest, load(storage), 2)
            assert plan is not None
            assert {shard.split for shard in plan.shards} == set()
    with pytest.raises(UserError, match="nothing would be left"):
        main([str(tmp_path), "compact"])
    assert generations(storage) == [1]


@pytest.mark.usefixtures("ray_cluster")
def test_copying_on_ray_gives_the_same_bytes(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(storage.url, tmp_path / "other")
    main([storage.url, "compact"])
    monkeypatch.setattr(compact, "NUM_SHARDS_IN_PROCESS", 0)
    monkeypatch.chdir(tmp_path)
    assert main(["other", "compact", "ray.num_cpus=2"]) == 0
    assert files_below(tmp_path / "other") == files_below(Path(storage.url))


def test_samples_are_read_in_few_pieces_and_no_piece_is_large(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    num = 2000
    index = ShardIndex(
        keys=np.array([f"{row:010d}".encode() for row in range(num)]),
        offsets=np.arange(num, dtype=np.int64)[:, None] * 3000 + np.array([512, 1536, 2560]),
        sizes=np.full((num, 3), 100, dtype=np.int64),
        xxh3=np.zeros((num, 3), dtype=np.uint64),
        sha256=np.zeros((num, 32), dtype=np.uint8),
    )
    monkeypatch.setattr(compact, "_READ_BYTES", 300_000)
    rows = [row for row in range(num) if row % 50 and not 700 < row < 900]
    runs = list(compact._runs(index, rows))
    assert [row for run in runs for row in run] == rows
    assert all((run[-1] - run[0] + 1) * 3000 <= 303_000 for run in runs)
    assert len(runs) <= 25


@pytest.mark.parametrize("damage", ["member", "missing"])
def test_a_damaged_old_shard_is_named_and_nothing_is_published(storage: Storage, damage: str) -> None:
    path = Path(storage.url) / "shards" / "train-000000.tar"
    index = ShardIndex.load(storage, "train-000000")
    row = int(load(storage).kept("train-000000", 8)[2])
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[index.offsets[row, 0] + 9] ^= 1
        path.write_bytes(data)
    expected = "train-000000.tar is missing" if damage == "missing" else rf"(?s)train-000000.tar is damaged.*sample {index.keys[row].decode()}"
    with pytest.raises(UserError, match=expected):
        main([storage.url, "compact"])
    assert generations(storage) == [1, 2]


KILLED = """
import os, shutil, signal, sys
from data_prep import generations
from data_prep.storage import LocalStorage

def dying(name):
    original = getattr(LocalStorage, name)
    def method(self, *values, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *values, **options)
    setattr(LocalStorage, name, method)

number, status = -1, signal.SIGKILL
while os.WIFSIGNALED(status):
    number += 1
    folder = f"{sys.argv[1]}-{number:02d}"
    shutil.copytree(sys.argv[1], folder)
    child = os.fork()
    if child == 0:
        left = number  # writes that succeed
        for name in ("put_bytes", "put_file", "put_new", "delete_many"):
            dying(name)
        generations.main([folder, "compact"])
        os._exit(0)
    _, status = os.waitpid(child, 0)
sys.exit(os.WEXITSTATUS(status))
"""


def test_killed_at_any_write_and_run_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "set")
    write_generation(storage.url, range(20))
    takedown([storage.url, "--key", facts(1).key, "--key", facts(10).key])
    shutil.copytree(storage.url, tmp_path / "killed" / "set")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed" / "set")], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    main([storage.url, "compact"])
    expected = files_below(Path(storage.url))
    copies = sorted((tmp_path / "killed").glob("set-*"))
    assert len(copies) >= 11, "tar, index, sidecar, record of each shard; ledger, manifest, records"
    for copy in copies:
        for generation in generations(open_storage(copy)):
            manifest = Manifest.load(open_storage(copy), generation)
            assert all((copy / "shards" / f"{shard.name}.tar").exists() for split in manifest.splits.values() for shard in split.shards)
        assert main([str(copy), "compact"]) == 0
        assert files_below(copy) == expected, copy.name


def test_work_of_another_plan_is_not_taken_up(storage: Storage) -> None:
    """A takedown between the killed run and the next changes what the shards must hold."""
    plan = plan_compaction(Manifest.load(storage), load(storage), 3)
    assert plan is not None
    for shard in plan.shards:
        write_shard(storage.url, shard, "png", plan.digest)
    takedown([storage.url, "--key", facts(20).key])
    main([storage.url, "compact"])
    assert 20 not in numbers_of(Manifest.load(storage), storage)
    assert verify([storage.url]) == 0


def test_old_generations_are_deleted_only_when_told_twice(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--yes"):
        main([storage.url, "compact", "--delete-old"])
    assert generations(storage) == [1, 2]
    assert main([storage.url, "compact", "--delete-old", "--yes"]) == 0
    assert generations(storage) == [3]
    named = {shard.name for split in Manifest.load(storage).splits.values() for shard in split.shards}
    for folder in ("shards", "metadata"):
        assert {path.partition("/")[2].partition(".")[0] for path in storage.list(f"{folder}/")} == named
    assert verify([storage.url]) == 0
    everything = b"".join(files_below(Path(storage.url) / "shards").values())
    assert sample(20).image in everything
    assert not any(sample(number).image in everything for number in GONE), "their bytes are gone"
    capsys.readouterr()
    assert main([storage.url]) == 0
    assert "generation 2 was deleted" in capsys.readouterr().out
    assert [base_of(storage, number) for number in (1, 2, 3)] == [None, 1, 2], "what continued what is still known"
    assert main([storage.url, "compact", "--delete-old", "--yes"]) == 0
    assert generations(storage) == [3]


def test_what_a_later_generation_needs_is_kept(storage: Storage) -> None:
    with pytest.raises(UserError, match="never compacted"):
        plan_deletion(storage)
    main([storage.url, "compact"])
    write_generation(storage.url, range(60, 70))
    main([storage.url, "rollback", "1"])
    storage.put_bytes("shards/train-g0006-000000.tar", b"being written")
    assert {number: base_of(storage, number) for number in generations(storage)} == {1: None, 2: 1, 3: 2, 4: 3, 5: 1}
    deletion = plan_deletion(storage)
    assert (deletion.since, deletion.generations) == (3, (1, 2))
    delete_old(storage, deletion)
    assert generations(storage) == [3, 4, 5]
    for generation in (3, 4, 5):
        assert verify([storage.url, "--generation", str(generation)]) == 0
    assert [base_of(storage, number) for number in (1, 2, 3, 4, 5)] == [None, 1, 2, 3, 1]
    assert storage.exists("shards/train-g0006-000000.tar"), "not of a generation that is there: another run may be writing it"
    second = {shard.name for split in Manifest.load(storage, 4).splits.values() for shard in split.shards}
    gone = {path.partition("/")[2].partition(".")[0] for path in deletion.paths}
    assert gone
    assert not gone & second
    main([storage.url, "compact", "--delete-old", "--yes"])
    assert generations(storage) == [6]
    assert [base_of(storage, number) for number in (1, 2, 3, 4, 5, 6)] == [None, 1, 2, 3, 1, 5]


def test_a_deletion_that_was_killed_is_finished_by_the_next(storage: Storage) -> None:
    main([storage.url, "compact"])
    for number in (1, 2):
        storage.delete(f"manifests/{number:06d}.json")
    assert main([storage.url, "compact", "--delete-old", "--yes"]) == 0
    named = {shard.name for split in Manifest.load(storage).splits.values() for shard in split.shards}
    assert {path.partition("/")[2].partition(".")[0] for path in storage.list("shards/")} == named


def test_all_of_it_works_on_an_object_store(s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes as on a local disk."""
    urls = [f"{s3_url}-history", str(tmp_path / "set")]
    for url in urls:
        write_generation(url, range(30))
        write_generation(url, range(40, 52))
        takedown([url, *(text for number in sorted(GONE) for text in ("--key", facts(number).key))])
        assert main([url, "compact", "--delete-old", "--yes"]) == 0
        assert verify([url]) == 0
    far, near = map(open_storage, urls)
    paths = [path for path in near.list() if not path.startswith("leases/")]
    assert [path for path in far.list() if not path.startswith("leases/")] == paths
    assert all(far.read_bytes(path) == near.read_bytes(path) for path in paths)
    assert far.list("leases/") == []
