"""What is stored can be read again."""

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep.config import ImageConfig
from data_prep.images.encode import decode_stored, encode
from tests.data_prep.conftest import smooth_pixels


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(32, 32), (32, 57)])
def test_round_trip(format: Any, channels: int, shape: tuple[int, int]) -> None:
    pixels = smooth_pixels(*shape)
    pixels = pixels[..., 0] if channels == 1 else pixels
    image = ImageConfig(resolution=32, format=format, channels=channels, quality=100 if format == "webp" else 95)
    found = decode_stored(encode(pixels, image))
    found = found[..., 0] if found.ndim > pixels.ndim else found  # WebP has no gray
    assert np.abs(found.astype(int) - pixels).mean() <= (0 if format != "jpg" else 2)
    assert encode(pixels, image) == encode(pixels.copy(), image)


@pytest.mark.parametrize(("subsampling", "expected"), [(444, "444"), (420, "420")])
def test_chroma_is_stored_as_configured(subsampling: Any, expected: str) -> None:
    data = encode(smooth_pixels(64, 64), ImageConfig(resolution=64, subsampling=subsampling))
    assert simplejpeg.decode_jpeg_header(data)[3] == expected


def test_pieces_of_larger_arrays_are_encoded_as_they_look() -> None:
    pixels = smooth_pixels(64, 64)
    for view in (pixels[10:42, 20:52], pixels[::-1, ::2]):
        for format in ("png", "jpg"):
            image = ImageConfig(format=format)  # type: ignore[arg-type]
            assert encode(view, image) == encode(np.ascontiguousarray(view), image)


def test_files_carry_no_metadata() -> None:
    for format in ("png", "jpg", "webp"):
        opened = Image.open(io.BytesIO(encode(smooth_pixels(32, 32), ImageConfig(format=format))))  # type: ignore[arg-type]
        assert not {"exif", "xmp", "icc_profile", "comment"} & opened.info.keys()
