"""Evaluation sets in every form, and the samples that are too close to them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from data_prep.config import DedupConfig, ImageConfig, PrepConfig
from data_prep.dedup.evaluation import build_evaluation, digest
from data_prep.dedup.run import Duplicates, find_duplicates
from data_prep.metadata import Facts
from data_prep.prepare import prepare
from data_prep.schema import Counts, ImageInfo, Manifest, Split, TokenizerInfo
from data_prep.storage import open_storage
from tests.data_prep.conftest import encoded, small_config, smooth_pixels
from tests.data_prep.dedup.planted import Verdicts, facts, flipped, run_here, settings, telling_hashes, write_base, write_parts
from tests.data_prep.dedup.quality import phash_of
from tests.data_prep.dedup.test_run import TINY, read_verdicts

CAPTION = "a tall lighthouse on the rocks at dusk with two gulls"


def noisy_picture(seed: int) -> Image.Image:
    """Distinct pictures, with detail."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((160, 160), Image.Resampling.BICUBIC)


def write_folder(folder: Path, seeds: list[int]) -> Path:
    folder.mkdir()
    for seed in seeds:
        (folder / f"item{seed:02d}.png").write_bytes(encoded(noisy_picture(seed)))
        (folder / f"item{seed:02d}.txt").write_text(f"{CAPTION} {seed}")
    return folder


def write_data_set(folder: Path, rows: list[Facts], resize_mode: str = "center_crop") -> Path:
    """A finished data set, as far as an evaluation set is read."""
    shards = write_base(folder, rows, 4)
    Manifest(
        generation=1,
        config={},
        config_hash="",
        image=ImageInfo(resolution=128, channels=3, extension="jpg", resize_mode=resize_mode),
        splits={"train": Split(num_samples=len(rows), shards=tuple(shards)), "heldout": Split()},
        tokenizer=TokenizerInfo(file="tokenizer.model", sha256="", num_pieces=1),
        counts=Counts(read=len(rows), kept=len(rows)),
    ).dump(open_storage(folder))
    return folder


def items(rows: list[Facts]) -> list[Facts]:
    """The rows with bytes that no training sample has."""
    return [replace(row, sha256=bytes(reversed(row.sha256))) for row in rows]


def find(config: PrepConfig, rows: list[Facts], *, size: int = 3) -> tuple[Duplicates, Verdicts]:
    parts = write_parts(Path(config.output), rows, size)
    found = find_duplicates(config, parts, run=run_here, scale=TINY)
    return found, read_verdicts(Path(config.output), parts)


def test_pictures_close_to_those_of_a_folder_go(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "coco", [1, 2])
    rows = [
        facts(0, phash=phash_of(encoded(noisy_picture(1), "JPEG", quality=60))),
        facts(1, phash=phash_of(encoded(noisy_picture(3)))),
        facts(2, phash=phash_of(encoded(noisy_picture(2).resize((300, 300)), "JPEG"))),
    ]
    config = replace(settings(tmp_path / "set", 3, evaluation=(str(folder),)), image=ImageConfig(resolution=128))
    found, dropped = find(config, rows)
    assert {key: (reason, detail.split(",")[0]) for key, (reason, detail) in dropped.items()} == {
        "0000000000": ("eval_image", "coco:item01.png"),
        "0000000002": ("eval_image", "coco:item02.png"),
    }
    assert list(found.digests) == [str(folder)]


def test_pictures_close_to_those_of_a_data_set_go(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    hashes = telling_hashes(10, generator)
    other = write_data_set(tmp_path / "val", items([facts(number, phash=value) for number, value in enumerate(hashes.tolist())]))
    near = flipped(hashes[:4], 3, generator).tolist()
    rows = [facts(number, phash=value) for number, value in enumerate([*near, *telling_hashes(20, generator).tolist()])]
    _, dropped = find(settings(tmp_path / "set", 3, evaluation=(str(other),)), rows)
    assert {key: detail.split(",")[0] for key, (_, detail) in dropped.items()} == {f"{number:010d}": f"val:{number:010d}" for number in range(4)}


def test_equal_bytes_count_where_hashes_tell_nothing(tmp_path: Path) -> None:
    other = write_data_set(tmp_path / "val", [facts(0, content="white page", phash=1 << 63)])
    rows = [facts(5, content="white page", phash=1 << 63), facts(6, content="gray page", phash=1 << 63)]
    _, dropped = find(settings(tmp_path / "set", 2, evaluation=(str(other),)), rows)
    assert dropped == {"0000000005": ("eval_image", "val:0000000000, 0 bits apart")}


def test_captions_are_compared_only_when_asked(tmp_path: Path) -> None:
    other = write_data_set(tmp_path / "val", items([facts(0, caption="something else entirely"), facts(1, caption=CAPTION), facts(2)]))
    rows = [facts(0, caption=CAPTION.upper()), facts(1, caption=f"{CAPTION} again"), facts(2, caption="a cat"), facts(3)]
    assert find(settings(tmp_path / "a", 4, evaluation=(str(other),)), rows)[1] == {}
    _, dropped = find(settings(tmp_path / "b", 4, evaluation=(str(other),), evaluation_caption_similarity=0.7), rows)
    assert dropped["0000000000"] == ("eval_caption", "val:0000000001, similarity 1.00")
    assert dropped["0000000001"][0] == "eval_caption"
    assert len(dropped) == 2


def test_the_closest_item_is_named_and_a_picture_before_a_caption(tmp_path: Path) -> None:
    (one,) = telling_hashes(1, np.random.default_rng(1)).tolist()
    near = [facts(0, phash=one ^ 0b1111), facts(1, phash=one ^ 0b11), facts(2, phash=one ^ 0b1100), facts(3, caption=CAPTION)]
    other = write_data_set(tmp_path / "val", near)
    config = settings(tmp_path / "set", 3, evaluation=(str(other),), evaluation_caption_similarity=0.7)
    assert find(config, [facts(7, phash=one, caption=CAPTION)])[1] == {"0000000007": ("eval_image", "val:0000000001, 2 bits apart")}


def test_what_goes_for_an_evaluation_item_takes_nobody_with_it(tmp_path: Path) -> None:
    """1 is near the item, 2 is near 1 but not near the item: 2 stays. 3 is a copy of 1 and goes for the item too."""
    (item,) = telling_hashes(1, np.random.default_rng(2)).tolist()
    other = write_data_set(tmp_path / "val", [facts(0, phash=item)])
    rows = [facts(1, content="x", phash=item ^ 0xF), facts(2, phash=item ^ 0xFF), facts(3, content="x", phash=item ^ 0xF)]
    config = settings(tmp_path / "set", 3, exact=True, image_distance=4, evaluation=(str(other),), evaluation_image_distance=4)
    _, dropped = find(config, rows)
    assert {key: reason for key, (reason, _) in dropped.items()} == {"0000000001": "eval_image", "0000000003": "eval_image"}


def test_all_samples_may_be_evaluation_samples(tmp_path: Path) -> None:
    hashes = telling_hashes(3, np.random.default_rng(3)).tolist()
    rows = [facts(number, phash=value) for number, value in enumerate(hashes)]
    other = write_data_set(tmp_path / "val", rows)
    _, dropped = find(settings(tmp_path / "set", 2, exact=True, image_distance=4, evaluation=(str(other),)), rows, size=2)
    assert len(dropped) == 3


def test_evaluation_samples_may_be_the_only_ones_far_behind_the_others(tmp_path: Path) -> None:
    """Numbers far apart are decided in different windows, and nothing is left to decide in that of the last two."""
    hashes = telling_hashes(4, np.random.default_rng(4)).tolist()
    rows = [facts(number, phash=value) for number, value in zip([0, 1, 5000, 9000], hashes, strict=True)]
    other = write_data_set(tmp_path / "val", rows[2:])
    config = settings(tmp_path / "set", 4, exact=True, image_distance=4, evaluation=(str(other),))
    assert list(find(config, rows, size=4)[1]) == ["0000005000", "0000009000"]


def test_an_unusable_picture_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "coco", [1])
    (folder / "broken.png").write_bytes(encoded(smooth_pixels(40, 40))[:200])
    config = replace(settings(tmp_path / "set", 3, evaluation=(str(folder),)), image=ImageConfig(resolution=128))
    _, dropped = find(config, [facts(0, phash=phash_of(encoded(noisy_picture(1))))])
    assert list(dropped) == ["0000000000"]
    assert "1 of 2 evaluation pictures cannot be used" in caplog.text


def test_sets_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    rows = [facts(0)]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    urls = tmp_path / "urls.csv"
    urls.write_text("url,caption\nhttp://127.0.0.1/a.jpg,a cat\n")
    uncut = write_data_set(tmp_path / "uncut", rows, resize_mode="keep_ratio")
    for number, (path, message) in enumerate(
        [(tmp_path / "nowhere", "does not exist"), (broken, "not one picture"), (urls, "cannot fetch"), (uncut, "cut differently")]
    ):
        with pytest.raises(UserError, match=message):
            find(settings(tmp_path / f"set{number}", 3, evaluation=(str(path),)), rows)


def test_a_missing_set_is_noticed_before_anything_is_written(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(make_folder(2), tmp_path / "out", dedup=DedupConfig(evaluation=(str(tmp_path / "nowhere"),)))
    with pytest.raises(UserError, match=r"nowhere does not exist(?s:.*)dedup\.evaluation"):
        prepare(config)
    assert not (tmp_path / "out").exists(), "the same output must do once the setting is mended"


def test_the_digest_follows_pictures_and_captions_and_nothing_else(tmp_path: Path) -> None:
    def digest_of(folder: str, rows: list[Facts], caption_similarity: float | None = None) -> str:
        other = write_data_set(tmp_path / folder / "val", rows)
        config = settings(tmp_path / folder / "set", 3, evaluation=(str(other),), evaluation_caption_similarity=caption_similarity)
        return find(config, [facts(0)])[0].digests[str(other)]

    rows = [facts(0, phash=7, caption="a"), facts(1, phash=8, caption="b")]
    first = digest_of("a", rows)
    assert len(first) == 64
    assert digest_of("b", rows) == digest_of("c", rows, caption_similarity=0.9) == first
    changed = [[facts(0, phash=9, caption="a"), rows[1]], [facts(0, phash=7, caption="c"), rows[1]], rows[:1], rows[::-1]]
    assert len({first, *(digest_of(f"d{number}", other) for number, other in enumerate(changed))}) == 5


def test_every_set_has_its_own_digest() -> None:
    columns = {"phash": np.arange(4, dtype=np.uint64), "sha256": np.zeros((4, 32), np.uint8), "has_picture": np.ones(4, bool)}
    captions = ["a", "b", "a", "b"]
    evaluation = build_evaluation(**columns, captions=captions, caption_similarity=None)
    first = np.arange(4) < 2
    assert digest(evaluation, first, captions) != digest(evaluation, ~first, captions)
