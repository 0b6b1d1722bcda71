"""Verdicts on whole sets of parts: the rule, whatever the order and the cutting of the work, and however often it was killed."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from data_prep import metadata
from data_prep.config import RayConfig
from data_prep.dedup.caption import agreement, choose_bands, minima_of, normalize, sketches_of
from data_prep.dedup.image import is_telling
from data_prep.dedup.pairs import popcount
from data_prep.dedup.run import Duplicates, Scale, find_duplicates, verdicts
from data_prep.metadata import Facts
from data_prep.storage import open_storage
from tests.data_prep.dedup.planted import Verdicts, facts, flipped, greedy_reference, run_here, settings, telling_hashes, write_base, write_parts
from tests.data_prep.dedup.quality import make_captions

TINY = Scale(gather_rows=100, search_rows=150, image_rows=120, image_work=300, window=64)
"""Many tasks of every kind, also the step that only large sets need."""

ALL = {"exact": True, "image_distance": 4, "caption_similarity": 0.8}


def crowded_rows(count: int, seed: int, first: int = 0) -> list[Facts]:
    """Rows of which many share bytes, are near in picture, or have nearly the same caption."""
    generator = np.random.default_rng(seed)
    centres = telling_hashes(count // 2, generator)
    hashes = flipped(centres[generator.integers(0, len(centres), count)], 3, generator)
    hashes[generator.random(count) < 0.05] = 1 << 63  # blank pictures
    stock = make_captions(count, generator)
    captions = [stock[number] for number in generator.integers(0, len(stock), count)]
    captions = [f"{text} extra" if generator.random() < 0.2 else text for text in captions]
    captions = ["" if generator.random() < 0.1 else text for text in captions]
    content = generator.integers(0, 3 * count, count)
    return [facts(first + number, content=int(content[number]), phash=int(hashes[number]), caption=captions[number]) for number in range(count)]


def read_verdicts(folder: Path, parts: Sequence[str]) -> Verdicts:
    storage, found = open_storage(folder), {}
    for part in parts:
        keys = metadata.load(storage, part, columns=["key"], folder="parts")["key"].to_pylist()
        kept, dropped = verdicts(storage, part)
        assert kept.tolist() == [row not in {row for row, _, _ in dropped} for row in range(len(keys))]
        found.update({keys[row]: (reason, detail) for row, reason, detail in dropped})
    return found


def closeness(rows: Sequence[Facts]) -> Callable[[int, int], bool]:
    """The rule for two samples, by position, with all of `ALL`."""
    minima = np.concatenate(list(minima_of(normalize([row.caption for row in rows]))), axis=1)
    sketches, least = sketches_of(minima), choose_bands(ALL["caption_similarity"]).min_agreement
    hashes = np.array([row.phash for row in rows], np.uint64)
    telling = is_telling(hashes)

    def is_close(one: int, other: int) -> bool:
        if rows[one].sha256 == rows[other].sha256:
            return True
        if telling[one] and telling[other] and popcount(hashes[one : one + 1] ^ hashes[other])[0] <= ALL["image_distance"]:
            return True
        both = bool(rows[one].caption and rows[other].caption)
        return both and bool(agreement(sketches[one : one + 1], sketches[other : other + 1])[0] >= least)

    return is_close


def test_verdicts_follow_the_rule(tmp_path: Path) -> None:
    rows = crowded_rows(500, seed=0)
    parts = write_parts(tmp_path, rows, 50)
    found = find_duplicates(settings(tmp_path, 50, **ALL), parts, run=run_here)
    dropped = read_verdicts(tmp_path, parts)
    kept = greedy_reference(range(500), closeness(rows))
    assert sorted(int(key) for key in dropped) == sorted(set(range(500)) - set(kept))
    assert {reason for reason, _ in dropped.values()} == {"duplicate", "near_duplicate_image", "near_duplicate_caption"}
    assert all(int(detail[:10]) in kept and int(detail[:10]) < int(key) for key, (_, detail) in dropped.items())
    assert sum(sum(counts.values()) for counts in found.counts.values()) == len(dropped)
    assert found.digests == {}


def test_published_samples_stay_and_what_is_like_them_goes(tmp_path: Path) -> None:
    """Also where they have larger numbers, as in a second-chance pass."""
    rows = crowded_rows(400, seed=1)
    base, new = rows[100:300], rows[:100] + rows[300:]
    shards, parts = write_base(tmp_path, base, 60), write_parts(tmp_path, new, 50)
    find_duplicates(settings(tmp_path, 50, **ALL), parts, shards, run=run_here, scale=TINY)
    ordered = base + new
    kept = greedy_reference(range(400), closeness(ordered), frozenset(range(200)))
    expected = {row.key for number, row in enumerate(ordered) if number not in kept}
    dropped = read_verdicts(tmp_path, parts)
    assert set(dropped) == expected
    assert any(100 <= int(detail[:10]) < 300 and int(key) < 100 for key, (_, detail) in dropped.items())


def test_neither_order_nor_cutting_nor_ray_changes_a_verdict(tmp_path: Path, ray_cluster: None) -> None:
    rows, base = crowded_rows(600, seed=2, first=300), crowded_rows(300, seed=3)
    found = []
    for number, (size, scale) in enumerate([(600, None), (37, TINY), (64, Scale(gather_rows=300, search_rows=400, window=500))]):
        folder = tmp_path / str(number)
        parts, shards = write_parts(folder, rows, size), write_base(folder, base, 70)
        config = replace(settings(folder, size, **ALL), ray=RayConfig(num_cpus=2))
        shuffled = np.random.default_rng(number).permutation(parts).tolist()
        find_duplicates(config, shuffled, shards, run=None if number == 2 else run_here, scale=scale)
        found.append(read_verdicts(folder, parts))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 100


def test_a_million_placeholders_would_be_one_group(tmp_path: Path) -> None:
    """A few thousand here: their pairs would be 12 million, and no search may store that."""
    generator = np.random.default_rng(4)
    (hash_of_all,) = telling_hashes(1, generator).tolist()
    rows = [facts(number, content="placeholder", phash=hash_of_all, caption="image not found") for number in range(5000)]
    parts = write_parts(tmp_path, rows, 1000)
    found = find_duplicates(settings(tmp_path, 1000, **ALL), parts, run=run_here)
    assert sum(counts["duplicate"] for counts in found.counts.values()) == 4999
    stored = list((tmp_path / "parts/dedup").rglob("*.edges"))
    assert stored
    assert all(path.stat().st_size == 0 for path in stored)


def test_blank_pictures_count_as_the_same_only_by_their_bytes(tmp_path: Path) -> None:
    rows = [facts(0, content="white", phash=1 << 63), facts(1, content="gray", phash=1 << 63), facts(2, content="white", phash=1 << 63)]
    parts = write_parts(tmp_path, rows, 3)
    find_duplicates(settings(tmp_path, 3, image_distance=6), parts, run=run_here)
    assert read_verdicts(tmp_path, parts) == {"0000000002": ("duplicate", "0000000000")}


def test_empty_captions_are_not_the_same_caption(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, [facts(number, caption="") for number in range(5)], 5)
    find_duplicates(settings(tmp_path, 5, caption_similarity=0.5), parts, run=run_here)
    assert read_verdicts(tmp_path, parts) == {}


def test_details_name_the_other_sample_and_how_close_it_is(tmp_path: Path) -> None:
    (phash,) = telling_hashes(1, np.random.default_rng(5)).tolist()
    text = "a small red car on the old bridge near the harbour"
    rows = [
        facts(10, phash=phash, caption=text),
        facts(11, phash=phash ^ 0b11, caption=""),
        facts(12, caption=text.title()),
        facts(13, phash=~phash % 2**64, caption="something else"),
        facts(14, content=("own", 13)),
    ]
    parts = write_parts(tmp_path, rows, 5)
    find_duplicates(settings(tmp_path, 5, **ALL), parts, run=run_here)
    assert read_verdicts(tmp_path, parts) == {
        "0000000011": ("near_duplicate_image", "0000000010, 2 bits apart"),
        "0000000012": ("near_duplicate_caption", "0000000010, similarity 1.00"),
        "0000000014": ("duplicate", "0000000013"),
    }


class KilledError(Exception):
    """Stands for the end of the process."""


class Interrupter:
    """Runs tasks here until a number of them is done; the last one loses its record, as if killed just before."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.done = folder, limit, 0

    def __call__(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        for argument in arguments:
            before = set((self.folder / "parts/dedup/records").glob("*"))
            result = function(*argument)
            self.done += 1
            if self.done == self.limit:
                (record,) = set((self.folder / "parts/dedup/records").glob("*")) - before
                record.unlink()
                raise KilledError
            yield result


def test_a_killed_search_repeats_only_what_was_unfinished(tmp_path: Path) -> None:
    rows = crowded_rows(300, seed=6)
    whole = Interrupter(tmp_path / "whole", -1)
    parts = write_parts(tmp_path / "whole", rows, 50)
    expected = find_duplicates(settings(tmp_path / "whole", 50, **ALL), parts, run=whole, scale=TINY)
    write_parts(tmp_path / "killed", rows, 50)
    config, done, found = settings(tmp_path / "killed", 50, **ALL), 0, None
    while found is None:
        runner = Interrupter(tmp_path / "killed", max(2, whole.done // 7))
        try:
            found = find_duplicates(config, parts, run=runner, scale=TINY)
        except KilledError:
            done -= 1
        done += runner.done
    assert found == expected
    assert done == whole.done
    assert read_verdicts(tmp_path / "killed", parts) == read_verdicts(tmp_path / "whole", parts)


def test_a_finished_search_does_nothing_again_and_another_one_forgets_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = write_parts(tmp_path, crowded_rows(100, seed=7), 50)
    runner = Interrupter(tmp_path, -1)

    def find(**dedup: Any) -> Duplicates:
        return find_duplicates(settings(tmp_path, 50, **dedup), parts, run=runner)

    first = find(**ALL)
    done = runner.done
    with caplog.at_level(logging.INFO):
        assert find(**ALL) == first
    assert runner.done == done
    assert "finished by an earlier run" in caplog.text
    assert set(find(exact=True).counts[parts[0]]) <= {"duplicate"}
    assert runner.done > done


def test_verdicts_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the same command again"):
        verdicts(open_storage(tmp_path), "000001/part-000000.abcd")


def test_a_published_shard_with_another_sidecar_is_refused(tmp_path: Path) -> None:
    rows = crowded_rows(40, seed=8)
    parts, shards = write_parts(tmp_path, rows[:20], 20), write_base(tmp_path, rows[20:], 20)
    with pytest.raises(UserError, match="damaged"):
        find_duplicates(settings(tmp_path, 20, **ALL), parts, [replace(shards[0], metadata_sha256="0" * 64)], run=run_here)


def test_work_runs_on_an_object_store(s3_url: str) -> None:
    rows = crowded_rows(120, seed=9)
    parts = write_parts(s3_url, rows, 40)
    find_duplicates(settings(s3_url, 40, **ALL), parts, run=run_here, scale=TINY)
    found = [verdicts(open_storage(s3_url), part)[0] for part in parts]
    assert int(np.concatenate(found).sum()) == len(greedy_reference(range(120), closeness(rows)))
