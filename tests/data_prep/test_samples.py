"""Samples are read back in order, in regular steps, and never those that were taken down; the verbs that show them agree."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from configs.errors import UserError
from data_prep import peek, stats
from data_prep.samples import chosen_rows, num_usable, stored_samples
from data_prep.schema import Manifest
from data_prep.storage import Storage, open_storage
from data_prep.takedown import main as takedown
from data_prep.tombstones import Tombstones, load
from tests.data_prep.history import facts, numbers_of, sample, write_generation

GONE = (1, 2, 9, 14)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Two generations, four samples taken down."""
    write_generation(tmp_path / "set", range(30))
    write_generation(tmp_path / "set", range(40, 52))
    takedown([str(tmp_path / "set"), *(text for number in GONE for text in ("--key", facts(number).key))])
    return open_storage(tmp_path / "set")


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (5, 7), (1, 4), (1000, 2)])
def test_every_nth_sample_that_is_left_is_read(storage: Storage, split: str, every: int, start: int) -> None:
    manifest = Manifest.load(storage)
    left = [number for number in numbers_of(manifest, storage, split) if number not in GONE]
    found = list(stored_samples(storage, manifest, split, every=every, start=start))
    assert [int(one.key) for one in found] == left[start::every]
    for one in found:
        expected = sample(int(one.key))
        assert (one.image, one.caption, one.values) == (expected.image, expected.txt.decode(), json.loads(expected.json))
    rows = sum(len(rows) for _, rows in chosen_rows(manifest, split, load(storage), every=every, start=start))
    assert rows == len(found)
    assert num_usable(manifest, split, load(storage)) == len(left)


def test_all_samples_can_be_asked_for(storage: Storage) -> None:
    manifest = Manifest.load(storage)
    found = stored_samples(storage, manifest, "train", tombstones=Tombstones())
    assert [int(one.key) for one in found] == numbers_of(manifest, storage)


def test_peek_passes_over_what_was_taken_down_and_shows_any_generation(storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for generation in ("1", "2"):
        capsys.readouterr()
        assert peek.main([storage.url, "--generation", generation, "--count", "100", "--dry-run"]) == 0
        shown = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()[:-1]]
        assert shown == [n for n in numbers_of(Manifest.load(storage, int(generation)), storage) if n not in GONE]
    with pytest.raises(UserError, match="that were not taken down"):
        peek.main([storage.url, "--start", "10000"])


def test_pictures_of_any_shape_keep_it_on_the_sheet(tmp_path: Path) -> None:
    write_generation(tmp_path / "set", range(4), width=32)
    storage = open_storage(tmp_path / "set")
    (one, *_) = stored_samples(storage, Manifest.load(storage), "train")
    sheet = peek.contact_sheet([one])
    top = 8 + peek.CELL // 4
    picture = sheet.crop((8, top, 8 + peek.CELL, top + peek.CELL // 2))
    assert sheet.crop((8, 8, 8 + peek.CELL, top)).getcolors() == [((peek.CELL) * (peek.CELL // 4), (255, 255, 255))]
    with Image.open(io.BytesIO(one.image)) as opened:
        assert picture.resize(opened.size, Image.Resampling.NEAREST).tobytes() == opened.convert("RGB").tobytes()


@pytest.mark.parametrize("with_labels", [True, False])
def test_stats_counts_what_is_left_of_any_generation(
    storage: Storage, with_labels: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From sidecars where the samples have no labels, else from their members: the same figures."""
    capsys.readouterr()
    if not with_labels:
        monkeypatch.setattr(stats, "_has_labels", lambda *_: False)
        monkeypatch.setattr(stats, "shard_samples", None)
    for generation in (1, 2):
        assert stats.main([storage.url, "--json", "--generation", str(generation)]) == 0
        found = json.loads(capsys.readouterr().out)
        manifest = Manifest.load(storage, generation)
        left = [n for split in ("train", "heldout") for n in numbers_of(manifest, storage, split) if n not in GONE]
        assert found["manifest"]["taken_down"] == len(GONE)
        assert found["statistics"]["num_samples"] == len(left)
        assert found["statistics"]["sides"]["max"] == 24
        assert found["statistics"]["sides"]["min"] == min(20 + n for n in left)
        assert found["statistics"]["image_bytes"]["max"] == max(len(sample(n).image) for n in left)
        assert found["statistics"]["image_bytes"]["mean"] == pytest.approx(sum(len(sample(n).image) for n in left) / len(left))
        assert found["statistics"]["formats"] == {"png": len(left)}
        assert bool(found["statistics"]["labels"]) == with_labels
        assert found["statistics"]["tokens"]["min"] >= 5
    assert stats.main([storage.url]) == 0
    assert "taken down         4 samples (takedown 1); not counted below" in capsys.readouterr().out
    assert stats.main([storage.url, "--dry-run"]) == 0
    assert "would read 38 of 38 samples" in capsys.readouterr().out


def test_both_ways_of_counting_agree(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(storage)
    members = stats.gather(storage.url, manifest, 20, load(storage))
    monkeypatch.setattr(stats, "_has_labels", lambda *_: False)
    sidecars = stats.gather(storage.url, manifest, 20, load(storage))
    assert members.labels
    assert not sidecars.labels
    sidecars.labels = members.labels
    assert sidecars == members
