"""The parts of decoding that `test_prepare` and `test_torture` do not see on their own."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.config import ImageConfig
from data_prep.images.decode import decode_jpeg, scaled_side, upright
from data_prep.images.jpeg import scan_jpeg
from data_prep.images.resize import fit
from tests.data_prep.conftest import encoded, smooth_pixels
from tests.data_prep.images.torture import shown


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_pillow_does(orientation: int) -> None:
    pixels = smooth_pixels(7, 11)
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(upright(pixels, orientation), np.asarray(ImageOps.exif_transpose(picture)))
    np.testing.assert_array_equal(upright(pixels[..., 0], orientation), np.asarray(ImageOps.exif_transpose(picture))[..., 0])


@pytest.mark.parametrize("shorter", [64, 150, 159, 160, 161, 319, 320, 333, 640, 642, 777])
def test_jpegs_are_scaled_by_powers_of_two_and_never_too_far(shorter: int) -> None:
    data = encoded(smooth_pixels(shorter, shorter + 90), "JPEG")
    facts = scan_jpeg(data)
    assert facts is not None
    found = decode_jpeg(data, facts, 1, b"", ImageConfig(resolution=64))
    assert found is not None
    divisor = {True: 8, shorter < 640: 4, shorter < 320: 2, shorter < 160: 1}[True]
    assert found.shape == (-(-shorter // divisor), -(-(shorter + 90) // divisor), 3)
    assert (scaled_side(shorter, 64) or shorter) == found.shape[0]
    assert min(found.shape[:2]) >= min(shorter, 80)


def test_real_photographs_come_out_as_if_decoded_whole() -> None:
    """Within a few grey levels of Pillow's pixels averaged down by OpenCV, over ratios from 1 to 8, for two pictures that are very sharp.

    Scaling while decoding is a sharper filter than averaging; where nothing is scaled, the two are the same.
    """
    datasets = pytest.importorskip("sklearn.datasets")
    errors = []
    for photograph in datasets.load_sample_images().images:
        data = encoded(photograph, "JPEG", quality=90)
        facts, whole = scan_jpeg(data), shown(data)
        assert facts is not None
        for ratio in np.linspace(1.1, 7.9, 12):
            image = ImageConfig(resolution=int(min(whole.shape[:2]) / ratio))
            found = decode_jpeg(data, facts, 1, b"", image)
            assert found is not None
            errors.append(np.abs(fit(found, image).astype(int) - fit(whole, image)).mean())
    assert min(errors) == 0
    assert np.mean(errors) <= 2.5
    assert max(errors) <= 5
