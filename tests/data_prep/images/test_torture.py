"""Every awkward file gets its verdict, in bounded memory, in a process that survives them all."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_prep.images.encode import decode_stored
from tests.data_prep.images.torture import Case, torture_cases

SIDE = 64
BUDGET = 400 * 2**20
"""What decoding may take above an idle process."""

_CHILD = """
import pickle, re, sys
from pathlib import Path
import cv2
from data_prep.config import FilterConfig, ImageConfig, LimitConfig
from data_prep.images.prepare import prepare_image
from data_prep.reasons import Drop

def verdict(data):
    try:
        found = prepare_image(data, ImageConfig(resolution=64, format="png"), LimitConfig(), FilterConfig(), int(sys.argv[1]))
    except Drop as drop:
        return drop.reason, drop.detail
    return "", (found.data, found.width, found.height, found.format, found.jpeg_quality, found.phash)

def peak_bytes():  # of this program; getrusage counts what the parent held when it forked
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

cv2.setNumThreads(1)
files, warm = pickle.load(sys.stdin.buffer)
for data in warm:
    verdict(data)
before = peak_bytes()
found = {name: verdict(data) for name, data in files.items()}
pickle.dump((found, peak_bytes() - before), sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def verdicts() -> tuple[dict[str, Any], int]:
    """Name -> (reason, detail or facts), and the peak of memory in bytes, from a child process."""
    cases = torture_cases()
    warm = [cases[name].data for name in ("plain.jpg", "cmyk_adobe_inverted.jpg", "display_p3.png", "lossy.webp", "lzw.tiff", "still.gif")]
    given = pickle.dumps(({name: case.data for name, case in cases.items()}, warm))
    command = [sys.executable, "-c", _CHILD, str(BUDGET)]
    child = subprocess.run(command, input=given, capture_output=True, timeout=250, check=False, cwd=Path(__file__).parents[3])
    assert child.returncode == 0, child.stderr.decode()
    return pickle.loads(child.stdout)


def reference(pixels: np.ndarray) -> np.ndarray:
    """The centred square of a whole picture, averaged down."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    return np.asarray(cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_CUBIC))


@pytest.mark.parametrize("name", torture_cases())
def test_verdict(name: str, verdicts: tuple[dict[str, Any], int]) -> None:
    case: Case = torture_cases()[name]
    reason, facts = verdicts[0][name]
    assert reason == case.reason, facts
    if reason:
        return
    data, width, height, format, _, _ = facts
    assert (width, height) == case.size
    assert format == (case.format or format)
    found = decode_stored(data)
    assert found.shape == (SIDE, SIDE, 3)
    if case.pixels is not None:
        assert np.abs(found.astype(int) - reference(case.pixels)).mean() <= case.mean


def test_no_file_takes_more_memory_than_the_budget(verdicts: tuple[dict[str, Any], int]) -> None:
    assert 100 * 2**20 < verdicts[1] < BUDGET  # the lower bound: the set does hold pictures that are large when decoded
