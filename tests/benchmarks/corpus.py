"""Web-like JPEGs cut from real photographs, and lists of their addresses. The same bytes for the same seed and library versions.

    python -m tests.benchmarks.corpus OUT [--count 2000] [--seed 0] [--base http://127.0.0.1:8731]

    OUT/images/000000.jpg, .txt   the pictures, each with its caption beside it (an input folder of `jetway prep`)
    OUT/urls.parquet              url, caption, similarity: every picture under three addresses, which differ in their query
    OUT/corpus.json               what was made; a second call with the same arguments does nothing

Means over 2,000: about 103 KB and 0.63 megapixels, 30 % progressive, qualities 60 to 95, mostly 4:2:0. The photographs come with
scikit-learn and scikit-image; nothing is downloaded.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = 1
"""Grows with every change of the pictures, so that old ones are made anew."""

PHOTOS = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": (
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg", "data/hubble_deep_field.jpg"),
        *("data/motorcycle_left.png", "data/motorcycle_right.png"),
    ),
}
ASPECTS = (4 / 3, 3 / 2, 1.0, 16 / 9, 3 / 4, 2 / 3, 5 / 4)
SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")

WORDS = """
    red blue green small old wooden quiet bright modern handmade vintage soft golden silver tall empty busy wild fresh house river cat
    market bicycle flower temple astronaut rocket coffee engine galaxy garden street bridge forest kitchen window dress table lamp guitar
    mountain beach harbour festival portrait landscape pattern poster recipe interior in on near under with and of for sale stock photo
    royalty free high resolution download now new york paris tokyo summer winter morning night
"""
FOREIGN = ("Café am Fluss – Sommer", "東京の夜景", "Москва, зимнее утро", "niño jugando al fútbol", "صورة قديمة", "ταβέρνα δίπλα στη θάλασσα")


def photographs() -> list[np.ndarray]:
    """The source photographs, uint8 [H, W, 3], in a fixed order.

    Raises:
        ModuleNotFoundError: scikit-learn or scikit-image is not installed (`pip install -e '.[peers]'`).
    """
    import skimage
    import sklearn

    roots = {"sklearn": Path(sklearn.__file__).parent, "skimage": Path(skimage.__file__).parent}
    return [np.asarray(Image.open(roots[package] / name).convert("RGB")) for package, names in PHOTOS.items() for name in names]


def make_image(photos: Sequence[np.ndarray], seed: int, number: int) -> bytes:
    """Picture `number` of the corpus as JPEG: a crop of a photograph at a web-like size, with a little sensor noise."""
    generator = np.random.default_rng((seed, number))
    photo = photos[int(generator.integers(len(photos)))]
    crop = _crop(photo, float(generator.choice(ASPECTS)), generator)
    pixels = float(np.clip(generator.lognormal(np.log(0.53e6), 0.6), 0.08e6, 3e6))
    aspect = crop.shape[1] / crop.shape[0]
    size = (max(32, round((pixels * aspect) ** 0.5)), max(32, round((pixels / aspect) ** 0.5)))
    scaled = np.asarray(Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    scaled = scaled * generator.uniform(0.85, 1.15) + generator.uniform(-12, 12)
    scaled += generator.standard_normal(scaled.shape, dtype=np.float32) * np.float32(generator.gamma(2.0, 1.95))
    picture = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(
        buffer,
        "JPEG",
        quality=int(generator.integers(60, 96)),
        progressive=bool(generator.random() < 0.3),
        subsampling=str(generator.choice(SUBSAMPLINGS, p=(0.85, 0.05, 0.10))),
    )
    return buffer.getvalue()


def make_caption(seed: int, number: int) -> str:
    """Caption `number`: alt text of the web, three to thirty words, some of it not English."""
    generator = np.random.default_rng((seed, number, 1))
    words = [str(word) for word in generator.choice(WORDS.split(), size=min(2 + int(generator.geometric(0.12)), 30))]
    text = " ".join(words).capitalize()
    return f"{text} {generator.choice(FOREIGN)}" if generator.random() < 0.08 else text


def write_corpus(folder: Path, count: int = 2000, seed: int = 0) -> dict[str, float]:
    """Writes pictures and captions below `folder/images`, unless they are there; returns counts and means."""
    wanted, record = {"version": VERSION, "count": count, "seed": seed}, folder / "corpus.json"
    if record.is_file() and (found := json.loads(record.read_text())) and all(found.get(name) == value for name, value in wanted.items()):
        return dict(found)
    images, photos = folder / "images", photographs()
    images.mkdir(parents=True, exist_ok=True)
    for stale in images.iterdir():
        stale.unlink()
    num_bytes, num_pixels, num_progressive = 0, 0, 0
    for number in range(count):
        data = make_image(photos, seed, number)
        (images / f"{number:06d}.jpg").write_bytes(data)
        (images / f"{number:06d}.txt").write_text(make_caption(seed, number), encoding="utf-8")
        picture = Image.open(io.BytesIO(data))
        num_bytes, num_pixels = num_bytes + len(data), num_pixels + picture.width * picture.height
        num_progressive += bool(picture.info.get("progressive"))
    means = {"mean_bytes": num_bytes / count, "mean_megapixels": num_pixels / count / 1e6, "progressive": num_progressive / count}
    record.write_text(json.dumps({**wanted, **means}) + "\n")
    return {**wanted, **means}


def write_list(path: Path, bases: Sequence[str], *, files: int, rows: int, seed: int = 0) -> None:
    """Writes a URL list of `rows` rows over the first `files` pictures: `BASE/000000.jpg?copy=0`, next round `copy=1`, ...

    `bases` are addresses of one server; the pictures take turns on them, since a list of the web names many hosts.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    captions = [make_caption(seed, number) for number in range(min(files, rows))]
    similarity = np.random.default_rng((seed, 2)).uniform(0.2, 0.45, rows).astype(np.float32)
    table = pa.table(
        {
            "url": [f"{bases[number % len(bases)]}/{number % files:06d}.jpg?copy={number // files}" for number in range(rows)],
            "caption": [captions[number % files] for number in range(rows)],
            "similarity": similarity,
        }
    )
    pq.write_table(table, path, row_group_size=10_000)


def main(argv: Sequence[str]) -> int:
    """Writes the corpus and its list, and prints the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=2000, help="pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default="http://127.0.0.1:8731", help="address of the server of the images folder (default %(default)s)")
    arguments = parser.parse_args(argv)
    found = write_corpus(arguments.folder, arguments.count, arguments.seed)
    write_list(arguments.folder / "urls.parquet", [arguments.base], files=arguments.count, rows=3 * arguments.count, seed=arguments.seed)
    print(" ".join(f"{name}={value:g}" for name, value in found.items()))
    return 0


def _crop(photo: np.ndarray, aspect: float, generator: np.random.Generator) -> np.ndarray:
    height, width = photo.shape[:2]
    share = generator.uniform(0.55, 1.0)
    rows = int(min(height, width / aspect) * share)
    columns = min(width, int(rows * aspect))
    top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
    crop = photo[top : top + rows, left : left + columns]
    return np.ascontiguousarray(crop[:, ::-1]) if generator.random() < 0.5 else crop


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
