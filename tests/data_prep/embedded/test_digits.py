"""Embedded digits: an ordinary folder, captions that name their digit, a scorer that reads real digits."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from data_prep.config import ImageConfig, TokenizerConfig
from data_prep.embedded import digits
from data_prep.embedded.digits_scorer import load_split, train_scorer
from data_prep.prepare import prepare
from data_prep.schema import Manifest
from data_prep.storage import open_storage
from tests.data_prep.conftest import small_config

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def prepared_digits(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert digits.write_folder(folder / "raw") == 1797
    image = ImageConfig(resolution=8, channels=1, format="png")
    tokenizer = TokenizerConfig(vocab_size=512, lower_case=True)
    prepare(small_config(folder / "raw", folder / "set", image=image, tokenizer=tokenizer, samples_per_shard=512, heldout_permille=100))
    return folder


def test_every_wording_names_its_digit() -> None:
    for digit in range(10):
        assert len(set(digits.prompts(digit))) == len(digits.WORDINGS) >= 6
        for prompt in digits.prompts(digit):
            assert digits.parse_digit(prompt) == digit
            assert prompt == prompt.lower()


@pytest.mark.parametrize("caption", ["", "a handwritten", "seven or eight", "the digit 77", "someone wrote it"])
def test_what_names_no_single_digit_is_not_read(caption: str) -> None:
    assert digits.parse_digit(caption) is None


def test_captions_use_every_wording_about_equally() -> None:
    used = np.unique([digits.caption_of(i, 7) for i in range(1797)], return_counts=True)[1]
    assert len(used) == len(digits.WORDINGS)
    assert used.min() > 0.6 * 1797 / len(used)


def test_folder_holds_pictures_captions_and_labels(prepared_digits: Path) -> None:
    images, labels = digits.load_digits()
    raw = prepared_digits / "raw"
    assert len(list(raw.iterdir())) == 3 * 1797
    for index in (0, 900, 1796):
        name = f"scan-{index:04d}"
        with Image.open(raw / f"{name}.png") as picture:
            assert picture.mode == "L"
            np.testing.assert_array_equal(np.asarray(picture), images[index])
        assert json.loads((raw / f"{name}.json").read_text()) == {"label": labels[index]}
        assert digits.parse_digit((raw / f"{name}.txt").read_text()) == labels[index]
    assert (images.min(), images.max()) == (0, 255)


def test_a_folder_is_never_written_half(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.txt").write_text("")
    with pytest.raises(OSError, match="not empty"):
        digits.write_folder(tmp_path / "raw")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_prepared_digits_keep_pixels_labels_and_short_captions(prepared_digits: Path) -> None:
    manifest = Manifest.load(open_storage(prepared_digits / "set"))
    assert manifest.counts.kept == 1797
    assert 120 < manifest.splits["heldout"].num_samples < 240
    train, heldout = (load_split(str(prepared_digits / "set"), split) for split in ("train", "heldout"))
    images, labels = digits.load_digits()
    originals = sorted((label, image.tobytes()) for image, label in zip(images, labels.tolist(), strict=True))
    stored = [(int(label), image.tobytes()) for part in (train, heldout) for image, label in zip(*part, strict=True)]
    assert sorted(stored) == originals


def test_scorer_reads_real_heldout_digits_and_rejects_noise(prepared_digits: Path) -> None:
    scorer = train_scorer(str(prepared_digits / "set"))
    assert scorer.heldout_accuracy > 0.97
    images, labels = load_split(str(prepared_digits / "set"), "heldout")
    assert scorer.num_heldout == len(images)
    assert scorer.accuracy(images, labels) == scorer.heldout_accuracy
    assert scorer.accuracy(images, (labels + 1) % 10) < 0.05
    assert scorer.accuracy(np.repeat(images[..., None], 3, axis=3), labels) == scorer.heldout_accuracy
    noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8), dtype=np.uint8)
    assert scorer.accuracy(noise, np.arange(500) % 10) < 0.2


def test_scorer_refuses_other_data_sets(data_set: Path) -> None:
    with pytest.raises(UserError, match="not a digits data set"):
        train_scorer(str(data_set))
