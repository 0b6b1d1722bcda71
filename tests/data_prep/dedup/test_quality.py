"""Floors under the recall and the precision that `quality` measures, on a part of its samples."""

import pytest

from tests.data_prep.dedup.quality import DISTANCES, SIMILARITIES, Table, caption_table, image_table, tiles


@pytest.fixture(scope="module")
def images() -> Table:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    return image_table(tiles()[::3])


def share(table: Table, row: str, threshold: float) -> float:
    return table.rows[row][table.thresholds.index(threshold)]


@pytest.mark.parametrize(
    ("change", "distance", "floor"),
    [
        ("as PNG", 2, 0.95),
        ("as WebP, quality 80", 4, 0.95),
        ("as JPEG, quality 95", 2, 0.95),
        ("as JPEG, quality 75", 4, 0.95),
        ("as JPEG, quality 30", 4, 0.9),
        ("as JPEG, quality 30", 6, 0.95),
        ("scaled 0.25x", 6, 0.95),
        ("scaled 0.5x", 4, 0.95),
        ("scaled 2x", 4, 0.95),
        ("scaled 4x", 4, 0.95),
        ("cropped by 2%", 6, 0.7),
        ("brightness +10 %", 4, 0.9),
    ],
)
def test_recall_of_changed_pictures(images: Table, change: str, distance: int, floor: float) -> None:
    assert share(images, change, distance) >= floor, images


def test_flipped_and_much_cropped_pictures_are_other_pictures(images: Table) -> None:
    """A limit, not a wish: who needs these must add flipped and cropped copies to the evaluation set."""
    assert share(images, "flipped left to right", 7) == 0, images
    assert share(images, "cropped by 10%", 7) < 0.2, images


def test_unrelated_pictures_are_not_taken_for_duplicates(images: Table) -> None:
    assert max(images.rows["unrelated pairs"]) < 0.003, images


def test_a_larger_distance_loses_nothing(images: Table) -> None:
    assert images.thresholds == DISTANCES
    assert all(shares == sorted(shares) for shares in images.rows.values())


@pytest.fixture(scope="module")
def captions() -> Table:
    return caption_table(600)


@pytest.mark.parametrize(
    ("change", "similarity", "floor"),
    [
        ("case and punctuation", 0.9, 1.0),
        ("a word more at the end", 0.8, 0.9),
        ("a word dropped", 0.7, 0.9),
        ("one word exchanged", 0.7, 0.75),
        ("one word exchanged", 0.6, 0.93),
        ("two words exchanged", 0.5, 0.75),
    ],
)
def test_recall_of_edited_captions(captions: Table, change: str, similarity: float, floor: float) -> None:
    assert share(captions, change, similarity) >= floor, captions


def test_unrelated_captions_are_not_taken_for_duplicates(captions: Table) -> None:
    assert captions.thresholds == SIMILARITIES
    assert max(captions.rows["unrelated pairs"]) < 1e-4, captions


def test_the_table_prints_every_row() -> None:
    table = Table(title="pictures", thresholds=(0, 4), rows={"as PNG": [0.5, 1.0]})
    assert str(table).splitlines()[1].split() == ["as", "PNG", "0.5", "1"]
