"""The life of a data set through the real commands: prepared, grown, taken down, compacted, rolled back, and grown again."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import prepare as prepare_module
from data_prep.generations import main as generations_main
from data_prep.prepare import prepare
from data_prep.retry import retry
from data_prep.schema import Manifest, generations
from data_prep.storage import Storage, open_storage
from data_prep.takedown import main as takedown
from data_prep.tombstones import load, load_files
from data_prep.verify import main as verify
from tests.data_prep.conftest import encoded, small_config, smooth_pixels
from tests.data_prep.history import numbers_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def grown(make_folder: Callable[..., Path], tmp_path: Path) -> tuple[Storage, Callable[[int], Manifest]]:
    """A prepared set of 12 and 6 samples in two generations, and grow(count): so many more pictures, and `jetway prep` once more."""
    total = 0

    def grow(count: int) -> Manifest:
        nonlocal total
        make_folder(count, first=total)
        total += count
        return prepare(small_config(tmp_path / "raw", tmp_path / "set"))[0]

    grow(12)
    grow(6)
    return open_storage(tmp_path / "set"), grow


def keys(storage: Storage, manifest: Manifest) -> list[int]:
    return sorted(numbers_of(manifest, storage, "train") + numbers_of(manifest, storage, "heldout"))


def sha256_of(tmp_path: Path, number: int) -> str:
    return hashlib.sha256((tmp_path / "raw" / f"p{number:03d}.png").read_bytes()).hexdigest()


def verify_all(storage: Storage) -> None:
    for generation in generations(storage):
        assert verify([storage.url, "--generation", str(generation)]) == 0


def test_it_grows_on_after_a_compaction_that_deleted_what_was_before(grown: tuple[Storage, Callable[[int], Manifest]]) -> None:
    storage, grow = grown
    takedown([storage.url, "--key", "0000000003", "--key", "0000000014"])
    assert generations_main([storage.url, "compact", "--delete-old", "--yes"]) == 0
    assert generations(storage) == [3]
    assert grow(0).generation == 3, "all that was read before is still known"
    manifest = grow(4)
    assert (manifest.generation, manifest.base, manifest.action) == (4, 3, "grow")
    assert keys(storage, manifest) == [number for number in range(22) if number not in (3, 14)]
    assert manifest.counts.dropped["takedown"] == 2
    assert retry(storage.url, ("timeout",)) == (manifest, False)
    verify_all(storage)


def test_after_a_rollback_it_grows_from_there_and_gives_no_key_twice(grown: tuple[Storage, Callable[[int], Manifest]]) -> None:
    storage, grow = grown
    assert generations_main([storage.url, "rollback", "1"]) == 0
    manifest = grow(0)
    assert (manifest.generation, manifest.base) == (4, 3)
    assert keys(storage, manifest) == [*range(12), *range(18, 24)], "the six came again, under keys of their own"
    verify_all(storage)


def test_what_was_asked_for_in_advance_is_dropped_when_it_comes(grown: tuple[Storage, Callable[[int], Manifest]], tmp_path: Path) -> None:
    storage, grow = grown
    later = hashlib.sha256(encoded(smooth_pixels(20, 24, seed=19))).hexdigest()
    (tmp_path / "rules.txt").write_text(f"sha256 {later}\n")
    takedown([storage.url, "--rules", str(tmp_path / "rules.txt")])
    manifest = grow(4)
    assert sha256_of(tmp_path, 19) == later
    assert manifest.counts.dropped == {"takedown": 1}
    assert 19 not in keys(storage, manifest)
    assert load(storage).number == 1, "nothing was left to take down"


def test_what_a_killed_run_had_judged_before_a_takedown_is_taken_down_at_the_end(
    grown: tuple[Storage, Callable[[int], Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, grow = grown
    build = prepare_module.build_generation

    def without_rules(*values: Any, takedowns: tuple[str, ...]) -> Manifest:
        assert len(takedowns) == 1
        return build(*values)

    monkeypatch.setattr(prepare_module, "build_generation", without_rules)
    (tmp_path / "list.txt").write_text(hashlib.sha256(encoded(smooth_pixels(20, 24, seed=19))).hexdigest())
    takedown([storage.url, "--sha256", str(tmp_path / "list.txt")])
    manifest = grow(4)
    assert 19 in keys(storage, manifest)
    (_, again) = load_files(storage)
    assert again.generations == (manifest.generation,)
    assert [key for hits in again.shards.values() for key in hits.keys] == ["0000000019"]
    verify_all(storage)


def test_a_run_killed_between_its_manifest_and_the_takedowns_is_finished_by_the_next(
    grown: tuple[Storage, Callable[[int], Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, grow = grown
    build = prepare_module.build_generation

    def killed(*values: Any, takedowns: tuple[str, ...]) -> Manifest:
        build(*values)  # with parts that were judged before the takedown
        raise KeyboardInterrupt

    (tmp_path / "list.txt").write_text(hashlib.sha256(encoded(smooth_pixels(20, 24, seed=19))).hexdigest())
    takedown([storage.url, "--sha256", str(tmp_path / "list.txt")])
    monkeypatch.setattr(prepare_module, "build_generation", killed)
    with pytest.raises(KeyboardInterrupt):
        grow(4)
    monkeypatch.setattr(prepare_module, "build_generation", build)
    manifest = grow(0)
    assert (manifest.generation, storage.list("parts/")) == (3, [])
    assert [key for hits in load_files(storage)[-1].shards.values() for key in hits.keys] == ["0000000019"]
