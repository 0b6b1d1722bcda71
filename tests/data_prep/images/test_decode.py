"""The parts of decoding that `test_prepare` and `test_torture` do not see on their own."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.config import ImageConfig
from data_prep.images.decode import decode_jpeg, scaled_side, upright
from data_prep.images.jpeg import scan_jpeg
from tests.data_prep.conftest import encoded, smooth_pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_pillow_does(orientation: int) -> None:
    pixels = smooth_pixels(7, 11)
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(upright(pixels, orientation), np.asarray(ImageOps.exif_transpose(picture)))
    np.testing.assert_array_equal(upright(pixels[..., 0], orientation), np.asarray(ImageOps.exif_transpose(picture))[..., 0])


@pytest.mark.parametrize("shorter", [64, 190, 191, 192, 193, 383, 384, 400, 768, 770, 777])
def test_jpegs_are_scaled_by_powers_of_two_and_never_too_far(shorter: int) -> None:
    data = encoded(smooth_pixels(shorter, shorter + 90), "JPEG")
    facts = scan_jpeg(data)
    assert facts is not None
    found = decode_jpeg(data, facts, 1, b"", ImageConfig(resolution=64))
    assert found is not None
    divisor = {True: 8, shorter < 768: 4, shorter < 384: 2, shorter < 192: 1}[True]
    assert found.shape == (-(-shorter // divisor), -(-(shorter + 90) // divisor), 3)
    assert (scaled_side(shorter, 64) or shorter) == found.shape[0]
    assert min(found.shape[:2]) >= min(shorter, 96)
