"""Cut and resize: one OpenCV resize, area-averaging where it shrinks and bicubic where it enlarges.

`center_crop` cuts the centred square out first: this equals "shorter side to R, centre crop" without resizing pixels that are
thrown away. Arrays are uint8 [height, width] or [height, width, 3].
"""

import cv2
import numpy as np

from data_prep.config import ImageConfig


def fit(pixels: np.ndarray, image: ImageConfig) -> np.ndarray:
    """The picture as it will be stored: [R, R(, 3)], or with `keep_ratio` the whole of it with R for its shorter side."""
    height, width = pixels.shape[:2]
    if image.resize_mode == "center_crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    wanted = fitted_size(width, height, image)
    if wanted == pixels.shape[1::-1]:
        return np.ascontiguousarray(pixels)
    method = cv2.INTER_AREA if min(pixels.shape[:2]) > image.resolution else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, wanted, interpolation=method))


def fitted_size(width: int, height: int, image: ImageConfig) -> tuple[int, int]:
    """(width, height) that `fit` gives a picture of this size; the longer side of `keep_ratio` rounds half up."""
    side = image.resolution
    if image.resize_mode == "center_crop":
        return side, side
    shorter = min(width, height)
    return (2 * width * side + shorter) // (2 * shorter), (2 * height * side + shorter) // (2 * shorter)
