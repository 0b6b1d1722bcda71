"""Several images in one PNG."""

import io
import math

import numpy as np
from PIL import Image
from torch import Tensor

MIN_TILE_PIXELS = 64
"""Smaller images are enlarged by a whole factor, without smoothing, to at least this."""


def image_grid(images: Tensor, *, num_columns: int | None = None, gap: int = 2) -> Image.Image:
    """Tiles uint8 [N, H, W, 1 or 3] row by row on white.

    Args:
        num_columns: None makes the grid about square, at most ten wide.
        gap: pixels between tiles.
    """
    array = images.detach().cpu().numpy()
    count, height, width, channels = array.shape
    if channels == 1:
        array = np.repeat(array, 3, axis=3)
    factor = max(1, math.ceil(MIN_TILE_PIXELS / max(height, width)))
    array = array.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    columns = num_columns or max(1, min(10, count, math.ceil(math.sqrt(count * 1.5))))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, tile in enumerate(array):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas)


def thumbnail(image: Tensor, *, max_pixels: int = 96) -> Image.Image:
    """One image, uint8 [H, W, 1 or 3], enlarged if tiny and reduced if large."""
    picture = image_grid(image[None])
    picture.thumbnail((max_pixels, max_pixels))
    return picture


def encode_png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
