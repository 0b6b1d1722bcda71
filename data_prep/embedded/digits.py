"""The 1,797 scanned handwritten digits that come with scikit-learn (UCI Optical Recognition of Handwritten Digits, test part).

8x8 gray images of 17 levels, collected from 43 people. Here: a folder of PNG files with captions of several wordings.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from data_prep.embedded import folder as writer

RESOLUTION = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a handwritten {word}",
    "the digit {numeral}",
    "a scan of the number {word}",
    "handwritten digit {numeral}",
    "the number {numeral} in pen",
    "somebody wrote {word}",
    "a small picture of a {word}",
    "this is a {numeral}",
)
"""Each names the digit exactly once, by word or by numeral; all lower case."""

_NAMES = {**{word: digit for digit, word in enumerate(WORDS)}, **{str(digit): digit for digit in range(10)}}


def prompts(digit: int) -> list[str]:
    """Every wording for one digit."""
    return [wording.format(word=WORDS[digit], numeral=digit) for wording in WORDINGS]


def caption_of(index: int, digit: int) -> str:
    """The caption of scan `index`: a wording chosen by hash."""
    choice = hashlib.sha256(f"digits/{index}".encode()).digest()[0]
    return prompts(digit)[choice % len(WORDINGS)]


def parse_digit(caption: str) -> int | None:
    """The digit that a caption names, None if it names none or several different ones."""
    found = {_NAMES[token] for token in re.findall(r"[a-z]+|[0-9]+", caption.lower()) if token in _NAMES}
    return found.pop() if len(found) == 1 else None


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [1797, 8, 8] with levels spread over 0..255, digits int64 [1797]).

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError("the embedded digits come with scikit-learn, which is not installed", fix='pip install -e ".[demo]"') from None
    bunch: Any = datasets.load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), np.asarray(bunch.target, dtype=np.int64)


def write_folder(folder: Path) -> int:
    """Writes all digits to a new folder as `scan-0000.png`, `.txt` (caption) and `.json` ({"label": digit}); returns 1797."""
    images, labels = load_digits()

    def items() -> Iterator[writer.Item]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            digit = int(label)
            yield f"scan-{index:04d}", image, caption_of(index, digit), {"label": digit}

    return writer.write_folder(folder, items(), len(images))
