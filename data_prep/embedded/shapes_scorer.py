"""Reads pictures of `shapes` and says which parts of a caption they follow.

Every pixel goes to the nearest colour of the palette; connected pixels of one colour are an object; its shape and size are
those of the drawing that covers the same pixels best. Nothing here is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data_prep.embedded.shapes import BACKGROUNDS, COLOURS, DIAMETERS, RESOLUTION, SHAPES, Group, Placed, Scene, coverage, parse_caption

MIN_PIXELS = 6
"""Smaller specks are noise; the smallest object covers 12 pixels."""

MIN_OVERLAP = 0.5
"""Least intersection over union with the best drawing for a blob to count as an object."""

ASPECTS = ("colour", "shape", "count", "size", "relation", "background")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows."""

    background: str
    objects: tuple[Placed, ...]
    num_unclear: int
    """Blobs that look like no object."""


def read_picture(picture: np.ndarray) -> Reading:
    """Objects and background of uint8 [32, 32, 3].

    Raises:
        ValueError: another shape.
    """
    if picture.shape != (RESOLUTION, RESOLUTION, 3):
        raise ValueError(f"shapes picture: got {picture.shape}, expected {(RESOLUTION, RESOLUTION, 3)}")
    pixels = picture.astype(np.float64)
    backgrounds = np.array(list(BACKGROUNDS.values()), dtype=np.float64)
    distance = np.linalg.norm(pixels[:, :, None] - backgrounds, axis=-1)
    nearest = np.argmin(distance, axis=-1)
    background = int(np.bincount(nearest.ravel(), minlength=len(backgrounds)).argmax())
    palette = np.concatenate([backgrounds[background : background + 1], np.array(list(COLOURS.values()), dtype=np.float64)])
    weights = _cover(pixels, palette)
    is_object = weights.max(axis=-1) > 0.5
    count, labels = cv2.connectedComponents(is_object.astype(np.uint8), connectivity=4)
    objects, unclear = [], 0
    for number in range(1, count):
        blob = labels == number
        if blob.sum() < MIN_PIXELS:
            continue
        item = _recognise(blob, pixels, palette)
        if item is None:
            unclear += 1
        else:
            objects.append(item)
    return Reading(tuple(BACKGROUNDS)[background], tuple(objects), unclear)


def score_picture(picture: np.ndarray, caption: str) -> dict[str, bool]:
    """Which of `ASPECTS` of the caption a picture follows; `relation` is left out when the caption states none.

    Raises:
        ValueError: the caption is not one that `shapes` could have written.
    """
    scene = parse_caption(caption)
    if scene is None:
        raise ValueError(f"{caption!r} is no caption of the shapes set")
    reading = read_picture(picture)
    groups = [scene.first] if scene.second is None else [scene.first, scene.second]
    found = [[item for item in reading.objects if item.colour == group.colour] for group in groups]
    total = sum(len(items) for items in found)
    score = {
        "colour": all(found) and total == len(reading.objects),
        "shape": all(_agree(items, group, "shape") for items, group in zip(found, groups, strict=True)),
        "count": all(len(items) == group.count for items, group in zip(found, groups, strict=True)) and reading.num_unclear == 0,
        "size": all(_agree(items, group, "size") for items, group in zip(found, groups, strict=True)),
        "background": reading.background == scene.background,
    }
    if scene.relation is not None:
        score["relation"] = all(found) and _relation(found[0], found[1]) == scene.relation
    return score


def score_pictures(pictures: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Share of pictures that follow each aspect of their captions, and `all` of them together."""
    scores = [score_picture(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    result = {aspect: [score[aspect] for score in scores if aspect in score] for aspect in ASPECTS}
    result["all"] = [all(score.values()) for score in scores]
    return {aspect: float(np.mean(values)) if values else float("nan") for aspect, values in result.items()}


def read_caption(caption: str, scene: Scene) -> bool:
    """Whether a written caption says exactly this scene (wording aside)."""
    return parse_caption(caption) == scene


def _cover(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Share of each pixel that each colour covers, if it were a mixture of that colour and the background: [h, w, colours]."""
    direction = palette[1:] - palette[0]
    share = ((pixels - palette[0]) @ direction.T) / (direction**2).sum(axis=-1)
    share = share.clip(0, 1)
    residual = np.linalg.norm(pixels[:, :, None] - palette[0] - share[..., None] * direction, axis=-1)
    best = residual.argmin(axis=-1)[..., None]
    return np.where(np.arange(len(direction)) == best, share, 0.0)


def _recognise(blob: np.ndarray, pixels: np.ndarray, palette: np.ndarray) -> Placed | None:
    # The inner pixels tell the colour; the edge is mixed with the background.
    inner = cv2.erode(np.pad(blob.astype(np.uint8), 1), np.ones((3, 3), np.uint8))[1:-1, 1:-1].astype(bool)
    inner = inner if inner.any() else blob
    colours = palette[1:]
    number = int(np.linalg.norm(colours - np.median(pixels[inner], axis=0), axis=-1).argmin())
    direction = colours[number] - palette[0]
    around = cv2.dilate(blob.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    cover = np.where(around, ((pixels - palette[0]) @ direction / (direction**2).sum()).clip(0, 1), 0.0)
    rows, columns = np.nonzero(cover > 0.25)
    ys, xs = np.arange(RESOLUTION) + 0.5, np.arange(RESOLUTION) + 0.5
    centre_x, centre_y = (cover.sum(axis=0) @ xs) / cover.sum(), (cover.sum(axis=1) @ ys) / cover.sum()
    if len(rows) == 0 or len(columns) == 0:
        return None
    best, best_overlap = None, MIN_OVERLAP
    for shape in SHAPES:
        for size, diameter in DIAMETERS.items():
            # A triangle's centroid lies a sixth of its height below the middle of its box.
            item = Placed(float(centre_x), float(centre_y - (diameter / 6 if shape == "triangle" else 0.0)), size, tuple(COLOURS)[number], shape)
            drawn = coverage(item)
            overlap = float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum())
            if overlap > best_overlap:
                best, best_overlap = item, overlap
    return best


def _agree(items: Sequence[Placed], group: Group, aspect: str) -> bool:
    return bool(items) and all(getattr(item, aspect) == getattr(group, aspect) for item in items)


def _relation(first: Sequence[Placed], second: Sequence[Placed]) -> str:
    dx = np.mean([item.x for item in second]) - np.mean([item.x for item in first])
    dy = np.mean([item.y for item in second]) - np.mean([item.y for item in first])
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"
