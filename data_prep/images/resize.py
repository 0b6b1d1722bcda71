"""Cut and resize: area-averaging where the picture shrinks, bicubic where it grows.

`center_crop` cuts the centred square out first: this equals "shorter side to R, centre crop" without resizing pixels that are
thrown away. Arrays are uint8 [height, width] or [height, width, 3].

OpenCV averages areas of a fractional ratio without vector instructions. Up to a ratio of three, sampling between the pixels on a
grid of twice the wanted size and then averaging 2x2 differs from it by about a third of a grey level and takes a third of the time.
"""

import cv2
import numpy as np

from data_prep.config import ImageConfig

_NEAR = 1.3  # up to here an area is hardly more than the two pixels that linear interpolation reads
_FAR = 3.0  # beyond, the doubled grid would miss pixels


def fit(pixels: np.ndarray, image: ImageConfig) -> np.ndarray:
    """The picture as it will be stored: [R, R(, 3)], or with `keep_ratio` the whole of it with R for its shorter side."""
    height, width = pixels.shape[:2]
    if image.resize_mode == "center_crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    return resize(pixels, fitted_size(width, height, image))


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes to (width, height), the ratio being about the same."""
    width, height = size
    ratio = pixels.shape[1] / width
    if pixels.shape[1::-1] == size:
        return np.ascontiguousarray(pixels)
    if ratio < 1:
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC))
    if ratio <= _NEAR:
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR))
    if ratio <= _FAR:
        pixels = cv2.resize(pixels, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def fitted_size(width: int, height: int, image: ImageConfig) -> tuple[int, int]:
    """(width, height) that `fit` gives a picture of this size; the longer side of `keep_ratio` rounds half up."""
    side = image.resolution
    if image.resize_mode == "center_crop":
        return side, side
    shorter = min(width, height)
    return (2 * width * side + shorter) // (2 * shorter), (2 * height * side + shorter) // (2 * shorter)
