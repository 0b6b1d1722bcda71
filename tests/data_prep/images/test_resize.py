"""Cutting and resizing."""

import cv2
import numpy as np
import pytest

from data_prep.config import ImageConfig
from data_prep.images.resize import fit, fitted_size, resize
from tests.data_prep.images.torture import picture


def test_the_crop_is_the_centred_square() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    image = ImageConfig(resolution=10)
    assert (fit(pixels, image) == 200).all()
    assert (fit(pixels.transpose(1, 0, 2), image) == 200).all()


@pytest.mark.parametrize("ratio", [1.05, 1.3, 1.31, 1.5, 1.77, 2.0, 2.5, 2.99, 3.0, 3.3, 5.1])
@pytest.mark.parametrize("channels", [1, 3])
def test_shrinking_averages_areas(ratio: float, channels: int) -> None:
    side = 96
    pixels = picture(round(ratio * side), round(ratio * side))[..., :channels].squeeze()
    exact = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA).astype(int)
    found = resize(pixels, (side, side)).astype(int)
    assert found.shape == exact.shape
    assert np.abs(found - exact).mean() <= 1.0
    assert abs(found.mean() - exact.mean()) < 0.2  # neither darker nor shifted


def test_nothing_moves() -> None:
    """The centre of gravity of a bright spot stays where it was, at every ratio."""
    rows, columns = np.mgrid[0:480, 0:480]
    spot = (250 * np.exp(-((rows - 150.3) ** 2 + (columns - 330.7) ** 2) / (2 * 40**2))).astype(np.uint8)
    for ratio in (1.2, 1.6, 2.0, 2.4, 3.0, 4.0, 7.5):
        side = round(480 / ratio)
        small = resize(spot, (side, side)).astype(float)
        places = (np.arange(side) + 0.5) * 480 / side - 0.5
        assert abs((small.sum(1) * places).sum() / small.sum() - 150.3) < 0.2
        assert abs((small.sum(0) * places).sum() / small.sum() - 330.7) < 0.2


def test_growing_is_bicubic_and_the_right_size_is_left_alone() -> None:
    pixels = picture(40, 40)
    np.testing.assert_array_equal(resize(pixels, (64, 64)), cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_CUBIC))
    np.testing.assert_array_equal(resize(pixels, (40, 40)), pixels)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 100), (32, 32)), ((200, 100), (64, 32)), ((100, 201), (32, 64)), ((101, 100), (32, 32)), ((1000, 9), (3556, 32)), ((5, 3), (53, 32))],
)
def test_keep_ratio_rounds_the_longer_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = ImageConfig(resolution=32, resize_mode="keep_ratio")
    assert fitted_size(*size, image) == expected
    assert fit(np.zeros((size[1], size[0], 3), np.uint8), image).shape[1::-1] == expected
    assert fitted_size(*size, ImageConfig(resolution=32)) == (32, 32)
