"""One image of one sample, from its bytes as found to its bytes as stored."""

import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import ImageFile

from data_prep.config import FilterConfig, ImageConfig, LimitConfig
from data_prep.images.decode import check_memory, decode_any, decode_jpeg, num_frames, open_image, orientation_of
from data_prep.images.encode import encode
from data_prep.images.header import Header, judge, judge_size, read_header
from data_prep.images.phash import phash
from data_prep.images.quality import check_pixels
from data_prep.images.resize import fit, fitted_size
from data_prep.reasons import Drop

_PNG_END = b"IEND\xaeB`\x82"
_TILE_TAGS = (322, 323)  # width and height of a TIFF's tiles, which may be larger than the picture


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """The image of one sample, ready to be stored."""

    data: bytes
    """Encoded in the configured format."""
    width: int
    """Of the original as it is shown, that is, after its EXIF rotation."""
    height: int
    format: str
    """Of the original, lower case: `jpeg`, `png`, ..."""
    jpeg_quality: int
    """Of the original, estimated from its quantisation tables, 1-100; -1 for other formats and unusual tables."""
    phash: int
    """64-bit perceptual hash of the pixels that were encoded."""


@dataclass(frozen=True, slots=True)
class _Picture:
    """A decoded image."""

    pixels: np.ndarray
    """Upright gray or sRGB, perhaps smaller than the original and cut already."""
    size: tuple[int, int]
    """(width, height) of the original as it is shown."""
    is_finished: bool
    """Whether the file could be stored as it is."""


def prepare_image(data: bytes, image: ImageConfig, limits: LimitConfig, filters: FilterConfig, memory_bytes: int) -> PreparedImage:
    """Checks, decodes, cuts, resizes, judges and encodes one image.

    Args:
        memory_bytes: what decoding one picture may take; what would need more is dropped before it is decoded.

    Raises:
        Drop: with the reason.
    """
    header = read_header(data, len(data)) or Header(format=None)
    judge(header, data, image, limits, filters)
    if header.width is not None and header.height is not None:
        check_memory(header.width, header.height, header, image.resolution, memory_bytes)
    picture = _decode_jpeg(data, header, image) or _decode_with_pillow(data, header, image, limits, memory_bytes)
    pixels = _with_channels(fit(picture.pixels, image), image.channels)
    check_pixels(pixels, filters)
    return PreparedImage(
        data=data if picture.is_finished else encode(pixels, image),
        width=picture.size[0],
        height=picture.size[1],
        format=header.format or "",
        jpeg_quality=header.jpeg.quality if header.jpeg is not None else -1,
        phash=phash(pixels),
    )


def _decode_jpeg(data: bytes, header: Header, image: ImageConfig) -> _Picture | None:
    """The short way, without Pillow unless the header is odd; None where Pillow has to decide."""
    facts = header.jpeg
    if facts is None or not facts.is_complete:
        return None
    orientation, profile = facts.orientation, facts.icc_profile
    if orientation is None or profile is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = open_image(data, "jpeg")
            orientation, profile = orientation_of(opened), opened.info.get("icc_profile") or b""
    pixels = decode_jpeg(data, facts, orientation, profile, image)
    if pixels is None:
        return None
    size = (facts.width, facts.height)
    is_finished = (
        image.format == "jpg"
        and facts.is_bare
        and facts.process in (0xC0, 0xC1, 0xC2)
        and facts.num_components == image.channels
        and size == fitted_size(*size, image)
    )
    return _Picture(pixels, size if orientation < 5 else (size[1], size[0]), is_finished)


def _decode_with_pillow(data: bytes, header: Header, image: ImageConfig, limits: LimitConfig, memory_bytes: int) -> _Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is not ours to mend
        opened = open_image(data, header.format or "")
        width, height = opened.size
        judge_size(width, height, limits)
        tiles = [side for side in map(getattr(opened, "tag_v2", {}).get, _TILE_TAGS) if isinstance(side, int)] or [0]
        check_memory(max(width, *tiles), max(height, *tiles), header, image.resolution, memory_bytes)  # libtiff decodes whole tiles
        if header.is_animated is None and image.animated == "drop" and (frames := num_frames(opened)) > 1:
            raise Drop("animated", f"{frames} frames")
        is_plain = _is_finished(data, opened, image)
        pixels, orientation = decode_any(opened, image)
        if header.format == "tiff" or orientation < 5:  # Pillow turns a TIFF itself, and gives its size as turned
            return _Picture(pixels, (width, height), is_plain and orientation == 1)
        return _Picture(pixels, (height, width), False)


def _is_finished(data: bytes, opened: ImageFile.ImageFile, image: ImageConfig) -> bool:
    """Whether a PNG or WebP can be stored as it is: size, mode and format as configured, whole, and no metadata (it may hold a location)."""
    if {"png": "PNG", "webp": "WEBP"}.get(image.format) != opened.format or opened.size != fitted_size(*opened.size, image):
        return False
    if opened.format == "PNG" and (data[24] != 8 or not data.endswith(_PNG_END)):  # bit depth of IHDR; Pillow shows 16-bit RGB as 8-bit
        return False
    foreign = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "icc_profile", "transparency"}
    return opened.mode == ("L" if image.channels == 1 else "RGB") and getattr(opened, "n_frames", 1) == 1 and not foreign & opened.info.keys()


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if channels == 3 and pixels.ndim == 2:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))
    if channels == 1 and pixels.ndim == 3:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))
    return pixels
