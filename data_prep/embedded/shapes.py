"""Procedural RGB scenes of 32x32 pixels with compositional captions: "two small red circles above a large blue square on white".

A scene is one group of equal objects, or two groups of different colours in a spatial relation, on a plain background. Scene
and picture are functions of (seed, index) through SHA-256, so the set is the same on every machine and any part of it can be
drawn alone. Coordinates are pixels, x to the right and y down, and pixel i covers [i, i + 1).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

import numpy as np

from data_prep.embedded import folder as writer

RESOLUTION = 32
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 215, 40),
    "purple": (150, 50, 170),
    "orange": (240, 135, 25),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
DIAMETERS = {"small": 5.0, "large": 9.0}
"""Width and height of an object in pixels."""
COUNTS = ("one", "two", "three")

Shape = Literal["circle", "square", "triangle"]
Relation = Literal["above", "below", "left of", "right of"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

_SUBSAMPLES = 8
"""Samples per pixel and axis for the antialiased edges."""

Option = TypeVar("Option")


@dataclass(frozen=True, slots=True)
class Group:
    """Equal objects in a row."""

    count: int
    size: str
    colour: str
    shape: Shape

    def describe(self, article: str = "a") -> str:
        """`two small red circles`; a single one takes `article`."""
        number = article if self.count == 1 else COUNTS[self.count - 1]
        return f"{number} {self.size} {self.colour} {self.shape}{'' if self.count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says."""

    first: Group
    relation: Relation | None
    """Of `first` to `second`; None when there is no second group."""
    second: Group | None
    background: str


@dataclass(frozen=True, slots=True)
class Placed:
    """One object of a picture, by its centre."""

    x: float
    y: float
    size: str
    colour: str
    shape: Shape


class _Draws:
    """Choices from the digits of one hash: a tiny generator without state outside this object."""

    def __init__(self, *key: object) -> None:
        self._pool = int.from_bytes(hashlib.sha512("/".join(map(str, key)).encode()).digest(), "big")

    def choose(self, options: Sequence[Option]) -> Option:
        self._pool, choice = divmod(self._pool, len(options))
        return options[choice]

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.choose(range(4096)) / 4095


def make_scene(index: int, seed: int = 0) -> Scene:
    """The scene of picture `index`; a third of them have one group."""
    draws = _Draws("scene", seed, index)
    first = _draw_group(draws, tuple(COLOURS))
    background = draws.choose(tuple(BACKGROUNDS))
    if draws.choose(range(3)) == 0:
        return Scene(first, None, None, background)
    relation = draws.choose(RELATIONS)
    second = _draw_group(draws, tuple(colour for colour in COLOURS if colour != first.colour))
    return Scene(first, relation, second, background)


def describe(scene: Scene, index: int = 0, seed: int = 0) -> str:
    """The caption of a scene; `index` chooses among equivalent wordings."""
    draws = _Draws("caption", seed, index)
    article = draws.choose(("a", "one"))
    ending = draws.choose(("on {}", "on a {} background")).format(scene.background)
    parts = [scene.first.describe(article)]
    if scene.relation is not None and scene.second is not None:
        parts += [scene.relation, scene.second.describe(article)]
    return " ".join([*parts, ending])


_GROUP = r"(a|one|two|three) (small|large) ({colours}) (circle|square|triangle)s?".format(colours="|".join(COLOURS))
_CAPTION = re.compile(
    rf"{_GROUP}(?: (above|below|left of|right of) {_GROUP})? on (?:a )?({'|'.join(BACKGROUNDS)})(?: background)?", flags=re.IGNORECASE
)


def parse_caption(caption: str) -> Scene | None:
    """The scene that a caption describes; None if it is not one of ours."""
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if match is None:
        return None
    fields = match.groups()
    second = _group(fields[5:9]) if fields[4] is not None else None
    return Scene(_group(fields[0:4]), cast("Relation | None", fields[4]), second, fields[9])


def arrange(scene: Scene, index: int = 0, seed: int = 0) -> list[Placed]:
    """Positions of all objects, first group first: each group a row (a column beside another group) with random shifts.

    The distance of two groups along their relation is always larger than across it, so no picture fits two relations.
    """
    draws = _Draws("place", seed, index)
    if scene.relation is None or scene.second is None:
        return _place_group(scene.first, RESOLUTION / 2, 10.0, False, draws)
    near, far = RESOLUTION / 4, RESOLUTION * 3 / 4
    is_column = scene.relation in ("left of", "right of")
    middle = (near, far) if scene.relation in ("above", "left of") else (far, near)
    return [
        *_place_group(scene.first, middle[0], 2.5, is_column, draws),
        *_place_group(scene.second, middle[1], 2.5, is_column, draws),
    ]


def render(objects: Sequence[Placed], background: str) -> np.ndarray:
    """The picture, uint8 [32, 32, 3], with edges averaged over 8x8 samples per pixel."""
    picture = np.empty((RESOLUTION, RESOLUTION, 3))
    picture[:] = BACKGROUNDS[background]
    for item in objects:
        cover = coverage(item)[..., None]
        picture = picture * (1 - cover) + cover * np.array(COLOURS[item.colour], dtype=np.float64)
    return np.rint(picture).astype(np.uint8)


def coverage(item: Placed) -> np.ndarray:
    """Share of every pixel that an object covers, float [32, 32]."""
    radius = DIAMETERS[item.size] / 2
    cover = np.zeros((RESOLUTION, RESOLUTION))
    left, right = (min(max(round(item.x + side * (radius + 1)), 0), RESOLUTION) for side in (-1, 1))
    top, bottom = (min(max(round(item.y + side * (radius + 1)), 0), RESOLUTION) for side in (-1, 1))
    x = (left + (np.arange((right - left) * _SUBSAMPLES) + 0.5) / _SUBSAMPLES - item.x)[None, :]
    y = (top + (np.arange((bottom - top) * _SUBSAMPLES) + 0.5) / _SUBSAMPLES - item.y)[:, None]
    if item.shape == "circle":
        inside = x * x + y * y <= radius * radius
    elif item.shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= radius
    else:  # point up, base down: half-width grows from 0 to the radius
        inside = (abs(y) <= radius) & (abs(x) <= (y + radius) / 2)
    cover[top:bottom, left:right] = inside.reshape(bottom - top, _SUBSAMPLES, right - left, _SUBSAMPLES).mean(axis=(1, 3))
    return cover


def make_sample(index: int, seed: int = 0) -> tuple[np.ndarray, str]:
    """(picture uint8 [32, 32, 3], caption) of one index."""
    scene = make_scene(index, seed)
    return render(arrange(scene, index, seed), scene.background), describe(scene, index, seed)


def write_folder(folder: Path, count: int, seed: int = 0) -> int:
    """Writes the first `count` samples to a new folder as `shapes-000000.png` and `.txt`; returns `count`."""

    def items() -> Iterator[writer.Item]:
        for index in range(count):
            picture, caption = make_sample(index, seed)
            yield f"shapes-{index:06d}", picture, caption, {}

    return writer.write_folder(folder, items(), count)


def _draw_group(draws: _Draws, colours: Sequence[str]) -> Group:
    return Group(draws.choose(range(1, 4)), draws.choose(tuple(DIAMETERS)), draws.choose(colours), draws.choose(SHAPES))


def _place_group(group: Group, middle: float, shift: float, is_column: bool, draws: _Draws) -> list[Placed]:
    """A row around y = `middle`, or a column around x = `middle`; `shift` is the largest common shift off that line."""
    across = middle + draws.uniform(-shift, shift)
    free = (RESOLUTION - 1) / group.count - DIAMETERS[group.size] - 1
    slack = min(free / 2, 3.5)
    placed = []
    for number in range(group.count):
        along = (RESOLUTION - 1) * (number + 0.5) / group.count + 0.5 + draws.uniform(-slack, slack)
        x, y = (across, along) if is_column else (along, across)
        placed.append(Placed(x, y, group.size, group.colour, group.shape))
    return placed


def _group(fields: Sequence[str]) -> Group:
    number = 1 if fields[0] == "a" else COUNTS.index(fields[0]) + 1
    return Group(number, fields[1], fields[2], cast(Shape, fields[3]))
