"""Embedded shapes: deterministic scenes, and a scorer that reads real pictures and rejects wrong ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.embedded.shapes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Group,
    Scene,
    arrange,
    describe,
    make_sample,
    make_scene,
    parse_caption,
    render,
    write_folder,
)
from data_prep.embedded.shapes_scorer import read_caption, read_picture, score_picture, score_pictures

SCENES = range(300)


def test_samples_depend_on_index_and_seed_only() -> None:
    picture, caption = make_sample(5)
    again, same = make_sample(5)
    np.testing.assert_array_equal(picture, again)
    assert caption == same
    assert make_sample(5, seed=1)[1] != caption
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8


def test_captions_say_the_scene_and_parse_back() -> None:
    for index in SCENES:
        assert parse_caption(describe(make_scene(index), index)) == make_scene(index)
    scene = Scene(Group(2, "small", "red", "circle"), "above", Group(1, "large", "blue", "square"), "white")
    assert parse_caption("two small red circles above a large blue square on white") == scene
    assert read_caption("Two small red circles above ONE large blue square on a white background", scene)
    assert not read_caption("two small red circles below a large blue square on white", scene)
    assert parse_caption("two small pink circles on white") is None
    assert parse_caption("") is None


def test_scenes_cover_every_choice() -> None:
    scenes = [make_scene(index) for index in range(1000)]
    assert {scene.first.colour for scene in scenes} == set(COLOURS)
    assert {scene.first.shape for scene in scenes} == set(SHAPES)
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {scene.first.count for scene in scenes} == {1, 2, 3}
    assert len({describe(scene) for scene in scenes}) > 800


def test_scorer_reads_real_pictures() -> None:
    pictures, captions = zip(*(make_sample(index) for index in SCENES), strict=True)
    scores = score_pictures(pictures, captions)
    assert min(scores.values()) >= 0.995, scores


def test_scorer_stands_some_noise() -> None:
    generator = np.random.default_rng(0)
    pictures, captions = zip(*(make_sample(index) for index in range(100)), strict=True)
    noisy = [np.clip(picture + generator.normal(0, 10, picture.shape), 0, 255).astype(np.uint8) for picture in pictures]
    assert score_pictures(noisy, captions)["all"] >= 0.97


@pytest.mark.parametrize("aspect", ["colour", "shape", "count", "size", "relation", "background"])
def test_scorer_rejects_a_picture_that_is_wrong_in_one_aspect(aspect: str) -> None:
    wrong = agree = total = 0
    for index in range(150):
        scene = make_scene(index)
        if scene.relation is None or scene.second is None:
            continue
        first = scene.first
        others = {
            "colour": replace(scene, first=replace(first, colour=next(c for c in COLOURS if c not in (first.colour, scene.second.colour)))),
            "shape": replace(scene, first=replace(first, shape=next(shape for shape in SHAPES if shape != first.shape))),
            "count": replace(scene, first=replace(first, count=first.count % 3 + 1)),
            "size": replace(scene, first=replace(first, size="small" if first.size == "large" else "large")),
            "relation": replace(scene, relation=RELATIONS[(RELATIONS.index(scene.relation) + 1) % 4]),
            "background": replace(scene, background="white" if scene.background != "white" else "black"),
        }
        changed = others[aspect]
        score = score_picture(render(arrange(changed, index), changed.background), describe(scene, index))
        total += 1
        wrong += not score[aspect]
        agree += all(value for name, value in score.items() if name not in (aspect, "shape", "count", "size", "relation"))
    assert wrong == total > 50
    if aspect not in ("colour", "background"):
        assert agree == total


def test_scorer_finds_nothing_in_noise_and_blanks() -> None:
    caption = make_sample(0)[1]
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    blank = np.full((32, 32, 3), 128, np.uint8)
    assert read_picture(blank).objects == ()
    for picture in (noise, blank):
        score = score_picture(picture, caption)
        assert not score["shape"]
        assert not score["count"]
    with pytest.raises(ValueError, match="no caption of the shapes set"):
        score_picture(blank, "a cat")
    with pytest.raises(ValueError, match="expected"):
        read_picture(np.zeros((8, 8, 3), np.uint8))


def test_folder_is_ordinary(tmp_path: Path) -> None:
    assert write_folder(tmp_path / "raw", 5) == 5
    assert sorted(path.name for path in (tmp_path / "raw").iterdir())[:2] == ["shapes-000000.png", "shapes-000000.txt"]
    assert (tmp_path / "raw" / "shapes-000003.txt").read_text().strip() == make_sample(3)[1]
