"""How many planted duplicates are found, and how many unrelated samples are taken for one: `python -m tests.data_prep.dedup.quality`.

Pictures are tiles of the photographs that come with scikit-learn and scikit-image, none overlapping another. Each is changed in every way
of `IMAGE_CHANGES` and prepared again; found means that the perceptual hash is within the distance (and tells anything at all).
Captions are changed by one or two words; found means at or above the similarity.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_prep.config import FilterConfig, ImageConfig, LimitConfig
from data_prep.dedup.caption import BUCKET_CAP, Bands, agreement, choose_bands, minima_of, normalize, sketches_of
from data_prep.dedup.image import is_telling, matches
from data_prep.dedup.pairs import colliding, popcount
from data_prep.images.prepare import prepare_image

TILE = 160
DISTANCES = (0, 2, 4, 6, 7)
SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.9)

_PHOTOS = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": (
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg", "data/retina.jpg", "data/ihc.png"),
        *("data/motorcycle_left.png", "data/camera.png", "data/coins.png", "data/hubble_deep_field.jpg"),
    ),
}


def _jpeg(quality: int) -> Callable[[Image.Image], bytes]:
    return lambda picture: encoded(picture, "JPEG", quality=quality)


def _scaled(factor: float) -> Callable[[Image.Image], bytes]:
    def change(picture: Image.Image) -> bytes:
        size = (round(picture.width * factor), round(picture.height * factor))
        return encoded(picture.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=90)

    return change


def _cut(share: float) -> Callable[[Image.Image], bytes]:
    """Without that share of the width on the right and of the height at the bottom."""
    return lambda picture: encoded(picture.crop((0, 0, round(picture.width * (1 - share)), round(picture.height * (1 - share)))), "JPEG", quality=90)


IMAGE_CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "as PNG": lambda picture: encoded(picture, "PNG"),
    "as WebP, quality 80": lambda picture: encoded(picture, "WEBP", quality=80),
    **{f"as JPEG, quality {quality}": _jpeg(quality) for quality in (95, 75, 50, 30)},
    **{f"scaled {factor}x": _scaled(factor) for factor in (0.25, 0.5, 2, 4)},
    **{f"cropped by {share:.0%}": _cut(share) for share in (0.02, 0.05, 0.1)},
    "brightness +10 %": lambda picture: encoded(picture.point(lambda level: min(255, round(level * 1.1))), "JPEG", quality=90),
    "flipped left to right": lambda picture: encoded(ImageOps.mirror(picture), "JPEG", quality=90),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of shares, under thresholds."""

    title: str
    thresholds: tuple[float, ...]
    rows: dict[str, list[float]]

    def __str__(self) -> str:
        lines = [f"{self.title:34}" + "".join(f"{threshold:>9g}" for threshold in self.thresholds)]
        lines += [f"{name:34}" + "".join(f"{share:9.3g}" for share in shares) for name, shares in self.rows.items()]
        return "\n".join(lines)


def encoded(picture: Image.Image, format: str, **options: int) -> bytes:
    """Bytes of an image file."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def tiles() -> list[Image.Image]:
    """Photographs cut into squares of `TILE` pixels, without the nearly empty ones.

    Raises:
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
    """
    import skimage
    import sklearn

    roots = {"sklearn": Path(sklearn.__file__).parent, "skimage": Path(skimage.__file__).parent}
    found = []
    for package, names in _PHOTOS.items():
        for name in names:
            photo = Image.open(roots[package] / name).convert("RGB")
            for left in range(0, photo.width - TILE + 1, TILE):
                for top in range(0, photo.height - TILE + 1, TILE):
                    tile = photo.crop((left, top, left + TILE, top + TILE))
                    if np.asarray(tile.convert("L")).std() > 10:
                        found.append(tile)
    return found


def phash_of(data: bytes) -> int:
    """Perceptual hash of an image file, as the data preparation stores it."""
    return prepare_image(data, ImageConfig(resolution=128), LimitConfig(), FilterConfig(), 2**30).phash


def image_table(pictures: Sequence[Image.Image]) -> Table:
    """Recall by kind of change; then the share of unrelated pairs that are taken for near-duplicates."""
    originals = np.array([phash_of(encoded(picture, "JPEG", quality=90)) for picture in pictures], np.uint64)
    rows = {}
    for name, change in IMAGE_CHANGES.items():
        changed = np.array([phash_of(change(picture)) for picture in pictures], np.uint64)
        bits = np.where(is_telling(originals) & is_telling(changed), popcount(originals ^ changed), 64)
        rows[name] = [float((bits <= distance).mean()) for distance in DISTANCES]
    telling = originals[is_telling(originals)]
    pairs = len(telling) * (len(telling) - 1) / 2
    rows["unrelated pairs"] = [len(matches(telling, distance)[0]) / pairs for distance in DISTANCES]
    return Table(title=f"{len(pictures)} pictures; bits", thresholds=DISTANCES, rows=rows)


WORDS = """red blue green small old wooden quiet bright modern handmade vintage soft golden silver tall empty busy wild fresh house river cat
    market bicycle flower temple astronaut rocket coffee engine galaxy garden street bridge forest kitchen window dress table lamp guitar
    mountain beach harbour festival portrait landscape pattern poster recipe interior in on near under with and of for sale stock photo
    free high resolution download now new york paris tokyo summer winter morning night two three young woman man dog sitting standing
    walking sunset water boat sky clouds city skyline vector illustration background white black wedding birthday cake food plate salad"""
VOCABULARY = np.array(WORDS.split())


def make_captions(count: int, generator: np.random.Generator) -> list[str]:
    """Captions of 6 to 16 words."""
    return [" ".join(generator.choice(VOCABULARY, generator.integers(6, 17))) for _ in range(count)]


def _exchange(text: str, count: int, generator: np.random.Generator) -> str:
    words = text.split()
    for place in generator.choice(len(words), count, replace=False):
        words[place] = str(generator.choice(VOCABULARY))
    return " ".join(words)


def _drop_word(text: str, generator: np.random.Generator) -> str:
    words = text.split()
    del words[generator.integers(len(words))]
    return " ".join(words)


CAPTION_CHANGES: dict[str, Callable[[str, np.random.Generator], str]] = {
    "case and punctuation": lambda text, _: text.title().replace(" ", ", ", 2) + "!",
    "a word more at the end": lambda text, generator: f"{text} {generator.choice(VOCABULARY)}",
    "a word dropped": _drop_word,
    "one word exchanged": lambda text, generator: _exchange(text, 1, generator),
    "two words exchanged": lambda text, generator: _exchange(text, 2, generator),
}


def caption_table(count: int) -> Table:
    """Recall by kind of change; then the share of unrelated pairs that are taken for near-duplicates."""
    generator = np.random.default_rng(0)
    originals = make_captions(count, generator)
    rows: dict[str, list[float]] = {name: [] for name in (*CAPTION_CHANGES, "unrelated pairs")}
    for similarity in SIMILARITIES:
        bands = choose_bands(similarity)
        for name, change in CAPTION_CHANGES.items():
            changed = [change(text, generator) for text in originals]
            found = close_captions(originals + changed, bands)
            rows[name].append(sum((number + count, number) in found for number in range(count)) / count)
        rows["unrelated pairs"].append(len(close_captions(originals, bands)) / (count * (count - 1) / 2))
    return Table(title=f"{count} captions; similarity", thresholds=SIMILARITIES, rows=rows)


def close_captions(captions: Sequence[str], bands: Bands) -> set[tuple[int, int]]:
    """(later, earlier) of all captions that the search finds close."""
    minima = np.concatenate(list(minima_of(normalize(captions))), axis=1)
    sketches, found = sketches_of(minima), set()
    for keys in bands.keys(minima):
        for later, earlier in colliding(keys, cap=BUCKET_CAP):
            close = agreement(sketches[later], sketches[earlier]) >= bands.min_agreement
            found |= set(zip(later[close].tolist(), earlier[close].tolist(), strict=True))
    return found


def main() -> None:
    """Prints both tables."""
    print(image_table(tiles()))
    print()
    print(caption_table(2000))


if __name__ == "__main__":
    main()
