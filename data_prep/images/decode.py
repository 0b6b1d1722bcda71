"""Image bytes -> upright 8-bit gray or sRGB pixels, or a reason why not.

JPEGs, most of the web, go through simplejpeg, which scales by 1/2, 1/4, 1/8 while decoding; all other formats, CMYK, and
JPEGs of which libjpeg-turbo complains go through Pillow. Either way the budget of memory is checked first, and no second copy of
a large picture is made: what Pillow has decoded is cut, converted and shrunk band by band.
Arrays are uint8 [height, width] or [height, width, 3] (RGB).
"""

import functools
import io
import math
import sys
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from data_prep.config import ImageConfig
from data_prep.images.colour import is_foreign, to_display, to_srgb
from data_prep.images.formats import DECODERS
from data_prep.images.header import Header, is_cut_short
from data_prep.images.jpeg import SUPPORTED, JpegFacts
from data_prep.reasons import Drop

_ORIENTATION = 0x0112
# What DCT scaling must leave for `fit` to do, over the wanted side. Its filter is sharper than averaging; on nine sharp photographs the result is
# off by 2.2 grey levels on average with 1.0, by 1.8 with 1.25, 1.4 with 1.5, 0.8 with 2.0. Each of the first two steps costs 6 % of the time.
_OVERSAMPLING = 1.25
_MAX_SCANS = 100  # encoders write about ten; thousands are a way to keep a decoder busy
_BAND = 2**20  # pixels that are converted at once
_WHOLE = 2**22  # pixels up to which a picture is not shrunk in Pillow first
_OVERHEAD = 48 * 2**20  # bytes for bands and the like

# Bytes per pixel that decoder and picture take together at their peak. Measured: 4.6 (PNG, BMP, PPM, plain TIFF), 8 (turned TIFF),
# 1.7 (GIF), 17 (WebP, whose decoder holds two canvases), 9 (AVIF of 8 bits without alpha).
_BYTES_PER_PIXEL = {"png": 6, "gif": 6, "bmp": 6, "ppm": 6, "tiff": 12, "webp": 18, "avif": 20}


def check_memory(width: int, height: int, header: Header, resolution: int, memory_bytes: int) -> None:
    """Refuses what would need more than the budget to decode, by an estimate that errs on the high side.

    Raises:
        Drop: too_many_pixels.
    """
    facts = header.jpeg
    if facts is None:
        needed = width * height * _BYTES_PER_PIXEL.get(header.format or "", 20)
    else:
        shorter = min(width, height)
        scale = (scaled_side(shorter, resolution) or shorter) / shorter
        needed = int(width * height * scale * scale * 8)
        needed += int(width * height * facts.samples_per_pixel * 2) if facts.is_buffered else 0
    if needed + _OVERHEAD > memory_bytes:
        budget = f"{(needed + _OVERHEAD) // 2**20} MiB to decode, {memory_bytes // 2**20} MiB allowed"
        raise Drop("too_many_pixels", f"{width}x{height} {header.format}: {budget}")


def decode_jpeg(data: bytes, facts: JpegFacts, orientation: int, profile: bytes, image: ImageConfig) -> np.ndarray | None:
    """A gray or three-component JPEG, scaled down while it is decoded as far as `image` allows; upright, in sRGB.

    Returns:
        None where libjpeg-turbo complains: Pillow then decides.

    Raises:
        Drop: unsupported_mode, or corrupt for an absurd number of scans.
    """
    _check_jpeg(data, facts)
    if facts.num_components not in (1, 3):
        return None
    foreign = is_foreign(profile)
    gray = facts.num_components == 1 or (image.channels == 1 and not foreign)
    side = scaled_side(min(facts.width, facts.height), image.resolution)
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY" if gray else "RGB", min_height=side, min_width=side)
    except ValueError:
        return None
    pixels = pixels[..., 0] if gray else pixels
    if foreign:
        pixels = np.asarray(to_srgb(Image.fromarray(pixels), profile))
    return upright(pixels, orientation)


def scaled_side(shorter: int, resolution: int) -> int:
    """Shorter side to decode a JPEG at: the smallest of 1/8, 1/4, 1/2 that leaves enough for a good resize; 0: all of it."""
    for divisor in (8, 4, 2):
        if shorter >= divisor * _OVERSAMPLING * resolution:
            return -(-shorter // divisor)
    return 0


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation."""
    if orientation == 1:
        return pixels
    if orientation in (5, 7):
        pixels = cv2.transpose(pixels)
        return cv2.rotate(pixels, cv2.ROTATE_180) if orientation == 7 else pixels
    if orientation in (2, 4):
        return cv2.flip(pixels, 1 if orientation == 2 else 0)
    turn = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}[orientation]
    return np.asarray(cv2.rotate(pixels, turn))


def open_image(data: bytes, format: str) -> ImageFile.ImageFile:
    """Opens an image of a known format with Pillow, which reads its header only.

    Raises:
        Drop: truncated, corrupt, or not_an_image where this Pillow cannot read the format.
    """
    if format.upper() not in _formats():
        raise Drop("not_an_image", f"this Pillow does not read {format}")
    try:
        return Image.open(io.BytesIO(data), formats=(format.upper(),))
    except Exception as error:  # malformed headers raise nearly anything, from struct.error to RecursionError
        if is_cut_short(data, format):
            raise Drop("truncated", f"{format} announces more bytes") from None
        if isinstance(error, UnidentifiedImageError):  # which says the name of the buffer and nothing else
            raise Drop("truncated" if len(data) < 1024 else "corrupt", f"unreadable {format} header") from None
        raise as_drop(error) from None


def num_frames(opened: ImageFile.ImageFile) -> int:
    """Frames or pages of an opened image.

    Raises:
        Drop: counting walks through the file, which may end or break anywhere.
    """
    try:
        return int(getattr(opened, "n_frames", 1))
    except Exception as error:
        raise as_drop(error) from None


def decode_any(opened: ImageFile.ImageFile, image: ImageConfig) -> tuple[np.ndarray, int]:
    """Whatever Pillow can read: upright gray or sRGB pixels, cut to the centred square unless the ratio is kept; and the orientation.

    Large pictures are shrunk to at least four times the wanted size.

    Raises:
        Drop: truncated, corrupt or unsupported_mode.
    """
    if opened.mode == "I" and opened.format not in ("PNG", "PPM"):
        raise Drop("unsupported_mode", "32-bit integers")
    try:
        inverted = opened.mode == "CMYK" and opened.format in ("JPEG", "MPO") and "adobe" not in opened.info
        if opened.format in ("JPEG", "MPO"):
            side = math.ceil(_OVERSAMPLING * image.resolution)
            opened.draft(opened.mode, (side, side))
        opened.load()
        orientation = orientation_of(opened)  # after `load`: PNG may have it at the end, and TIFF is turned by Pillow itself
        box = (0, 0, *opened.size)
        if image.resize_mode == "center_crop":
            box = _centred_square(opened.size, orientation)
        factor = 1
        if (box[2] - box[0]) * (box[3] - box[1]) > _WHOLE:
            factor = max(1, min(box[2] - box[0], box[3] - box[1]) // (4 * image.resolution))
        return upright(_convert(opened, box, factor, image, inverted), orientation), orientation
    except Drop:
        raise
    except Exception as error:  # a broken file makes the decoders raise nearly anything; it costs this file only
        raise as_drop(error) from None


def _check_jpeg(data: bytes, facts: JpegFacts) -> None:
    """Refuses JPEGs that no browser shows either."""
    if facts.process not in SUPPORTED or facts.precision != 8:
        raise Drop("unsupported_mode", f"JPEG process {facts.process:#x}, {facts.precision} bits")
    if facts.is_buffered and data.count(b"\xff\xda") > _MAX_SCANS:
        raise Drop("corrupt", f"more than {_MAX_SCANS} scans")


def _convert(opened: Image.Image, box: tuple[int, int, int, int], factor: int, image: ImageConfig, is_inverted: bool) -> np.ndarray:
    """The box as gray or sRGB, shrunk by a whole factor, band by band; what is left over of it, less than `factor`, is cut at its edges."""
    left, top, right, bottom = box
    over_x, over_y = (right - left) % factor, (bottom - top) % factor
    left, top, right, bottom = left + over_x // 2, top + over_y // 2, right - (over_x + 1) // 2, bottom - (over_y + 1) // 2
    rows = max(1, _BAND // (right - left) // factor) * factor
    if (right - left) * (bottom - top) <= _WHOLE:
        rows = bottom - top
    bands = []
    for start in range(top, bottom, rows):
        part = (left, start, right, min(bottom, start + rows))
        band = opened if part == (0, 0, *opened.size) else opened.crop(part)
        band = to_display(band, opened.info, image.matte, is_inverted=is_inverted)
        bands.append(np.asarray(band.reduce(factor) if factor > 1 else band))
    return bands[0] if len(bands) == 1 else np.concatenate(bands)


def _centred_square(size: tuple[int, int], orientation: int) -> tuple[int, int, int, int]:
    """Box, in stored pixels, of the square that `fit` would cut from the upright picture."""
    width, height = size
    side = min(size)
    # An odd margin is cut wider at the far end of the picture as shown, which a turn may have made the near end as stored.
    left = (width - side + (orientation in (2, 3, 7, 8))) // 2
    top = (height - side + (orientation in (3, 4, 6, 7))) // 2
    return left, top, left + side, top + side


def orientation_of(opened: Image.Image) -> int:
    """EXIF orientation 1-8; 1 where there is none, or where the EXIF block cannot be read."""
    try:
        value: Any = opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF is untrusted bytes, and an image with broken EXIF is still a good image
        return 1
    return value if value in range(1, 9) else 1


def as_drop(error: Exception) -> Drop:
    """The verdict that a decoder's exception amounts to."""
    if isinstance(error, MemoryError):
        raise error
    text = f"{type(error).__name__}: {error}"[:200]
    if isinstance(error, Image.DecompressionBombError):
        return Drop("too_many_pixels", text)
    early = any(sign in text.lower() for sign in ("truncated", "unexpected end", "eof", "not enough", "incomplete"))
    return Drop("truncated" if early else "corrupt", text)


@functools.cache
def _formats() -> frozenset[str]:
    """Those of `DECODERS` that the installed Pillow can read."""
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # sizes are judged by our own limits, before this one would be
    if avif := sys.modules.get("PIL.AvifImagePlugin"):
        avif.DEFAULT_MAX_THREADS = 1  # type: ignore[attr-defined]  # one task per CPU: more threads would fight over them
    return frozenset(name for name in DECODERS if name in Image.OPEN)
