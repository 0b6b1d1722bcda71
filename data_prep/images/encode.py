"""Pixels -> the bytes that are stored, and back."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.config import ImageConfig


def encode(pixels: np.ndarray, image: ImageConfig) -> bytes:
    """uint8 [h, w] or [h, w, 3] in the configured format; the same bytes for the same pixels."""
    if image.format == "jpg":
        if pixels.ndim == 2:
            return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., None]), quality=image.quality, colorspace="GRAY", colorsubsampling="Gray")
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=image.quality, colorspace="RGB", colorsubsampling=str(image.subsampling))
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if image.format == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "WEBP", quality=image.quality, lossless=image.quality == 100, method=4)
    return buffer.getvalue()


def decode_stored(data: bytes) -> np.ndarray:
    """Pixels of an image that `encode` wrote: uint8 [h, w] or [h, w, 3]."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
        return np.asarray(opened.convert("L" if opened.mode == "L" else "RGB"))
