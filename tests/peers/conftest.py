"""One data set, written by `jetway prep`, for all tools to read."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.samples import StoredSample, stored_samples
from data_prep.schema import SPLITS, Manifest
from data_prep.storage import open_storage

NUM_SAMPLES = 300
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
CAPTIONS = ("a plain caption {}", "Straße № {} — größer", "東京の夜景 {}", "صورة رقم {}", "emoji 🚲🌷 {}", 'quotes " and \\ and\ttabs {}')

SETTINGS = (
    *("missing_caption=empty", "samples_per_shard=40", "heldout_permille=200", "keep_dropped=true"),
    *("image.resolution=32", "tokenizer.vocab_size=350", "tokenizer.num_threads=1", "ray.num_cpus=1"),
)


def run(*command: object, cwd: Path | None = None) -> str:
    """Runs a command to success and returns its output."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))} returned {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def write_input(folder: Path) -> None:
    """A table of pictures in many formats; captions, labels and other columns are there for some rows only; one file is broken."""
    rows = []
    for number in range(NUM_SAMPLES):
        generator = np.random.default_rng(number)
        height, width = (int(side) for side in generator.integers(24, 90, 2))
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        buffer, kind = io.BytesIO(), FORMATS[number % len(FORMATS)]
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind)
        name = f"bild-ä{number}.{kind.lower()}"
        (folder / name).write_bytes(buffer.getvalue())
        row: dict[str, Any] = {"image": name, "license": f"CC-{number % 3}"}
        if number % 7:
            row["caption"] = CAPTIONS[number % len(CAPTIONS)].format(number)
        if number % 3:
            row["label"] = number % 10
        if number > 50 and number % 5 == 0:
            row["author"] = "Zoë"  # a column that the first samples lack
        rows.append(row)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")
    rows.insert(20, {"image": "broken.jpg", "caption": "broken"})
    (folder / "table.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 300 samples in several shards of both splits."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "raw").mkdir()
    write_input(folder / "raw")
    run(Path(sys.executable).with_name("jetway"), "prep", "--input", folder / "raw" / "table.jsonl", "--output", folder / "set", *SETTINGS)
    return folder / "set"


@pytest.fixture(scope="session")
def samples(data_set: Path) -> dict[str, StoredSample]:
    """What our own reader finds in it, by key."""
    storage = open_storage(str(data_set))
    manifest = Manifest.load(storage)
    found = {sample.key: sample for split in SPLITS for sample in stored_samples(storage, manifest, split)}
    assert len(found) == NUM_SAMPLES
    assert all(len(manifest.splits[split].shards) > 1 for split in SPLITS)
    return found
