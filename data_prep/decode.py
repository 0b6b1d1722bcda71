"""Image bytes of any origin -> one square 8-bit image, or a reason why not.

The header is read first (Pillow opens lazily and trusts magic bytes, not names), the limits are checked on it, and only
then is anything decoded. Plain JPEGs, most of the web, go through simplejpeg, which scales by 1/2, 1/4, 1/8 while decoding;
everything else and every odd JPEG (EXIF rotation, CMYK, foreign ICC profile) goes through Pillow.

Cut and resize: the centred square of the source, then one OpenCV resize, area-averaging when it shrinks and bicubic when it
enlarges. This equals "shorter side to R, centre crop" without resizing pixels that are thrown away.
Arrays are uint8 [height, width] or [height, width, 3] (RGB).
"""

import functools
import io
import warnings
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from data_prep.config import ImageConfig, LimitConfig
from data_prep.reasons import Drop

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Pillow decoders that may see untrusted bytes (JPEG includes MPO); anything else is `not_an_image`."""

EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "pnm"})
"""File names that are taken for images when a folder or a tar is listed."""

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_PNG_END = b"IEND\xaeB`\x82"
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """The image of one sample, ready to be stored."""

    data: bytes
    """Encoded in the configured format."""
    width: int
    """Of the original, as its header says."""
    height: int
    format: str
    """Of the original, lower case: `jpeg`, `png`, ..."""


def prepare_image(data: bytes, image: ImageConfig, limits: LimitConfig) -> PreparedImage:
    """Checks, decodes, crops, resizes and encodes one image.

    Raises:
        Drop: with the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes that we judge ourselves
        opened = _open(data)
        width, height = opened.size
        _check_header(opened, image, limits)
        plain = _is_plain(opened)
        is_jpeg = opened.format in ("JPEG", "MPO")
        fast = _decode_plain_jpeg(data, opened, image) if plain and is_jpeg else None
        pixels = fast if fast is not None else _decode(opened, image)
    source_format = "jpeg" if is_jpeg else str(opened.format).lower()
    is_sound = fast is not None if is_jpeg else opened.format != "PNG" or data.endswith(_PNG_END)
    if plain and is_sound and _is_finished(data, opened, image):
        return PreparedImage(data=data, width=width, height=height, format=source_format)
    square = crop_and_resize(pixels, image.resolution)
    return PreparedImage(data=encode(square, image), width=width, height=height, format=source_format)


def crop_and_resize(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The centred square of [h, w] or [h, w, 3], resized to [resolution, resolution(, 3)]."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == resolution:
        return np.ascontiguousarray(square)
    method = cv2.INTER_AREA if side > resolution else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(square), (resolution, resolution), interpolation=method))


def encode(pixels: np.ndarray, image: ImageConfig) -> bytes:
    """uint8 [R, R] or [R, R, 3] in the configured format; the same bytes for the same pixels."""
    if image.format == "jpg":
        # 4:4:4, because halved colour resolution is a pattern that a pixel-exact likelihood model would have to learn.
        if pixels.ndim == 2:
            return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., None]), quality=image.quality, colorspace="GRAY", colorsubsampling="Gray")
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=image.quality, colorspace="RGB", colorsubsampling="444")
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if image.format == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "WEBP", quality=image.quality, lossless=image.quality == 100, method=4)
    return buffer.getvalue()


def decode_stored(data: bytes) -> np.ndarray:
    """Pixels of an image that `encode` wrote: uint8 [R, R] or [R, R, 3]."""
    with Image.open(io.BytesIO(data), formats=_formats()) as opened:
        return np.asarray(opened.convert("L" if opened.mode == "L" else "RGB"))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow can read (AVIF came with 11.3)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise Drop("not_an_image", "empty file")
    try:
        if data[:4] == b"RIFF" and len(data) < int.from_bytes(data[4:8], "little") + 8:
            raise Drop("truncated", "RIFF announces more bytes")  # libwebp only says "could not create decoder"
        return Image.open(io.BytesIO(data), formats=_formats())
    except Drop:
        raise
    except Image.DecompressionBombError as error:
        raise Drop("too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        known = data.startswith(_MAGIC) or data[4:8] == b"ftyp"
        raise Drop("truncated" if known else "not_an_image", "unreadable header" if known else repr(data[:16])) from None
    except Exception as error:  # malformed headers raise nearly anything, from struct.error to RecursionError
        raise _as_drop(error) from None


def _check_header(opened: ImageFile.ImageFile, image: ImageConfig, limits: LimitConfig) -> None:
    width, height = opened.size
    size = f"{width}x{height}"
    if width * height > limits.max_pixels:
        raise Drop("too_many_pixels", size)
    if min(width, height) < max(1, limits.min_side):
        raise Drop("too_small", size)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise Drop("aspect_ratio", size)
    if image.animated == "drop" and opened.format != "MPO":  # MPO: a phone's JPEG with a second view or preview behind it
        try:
            frames = getattr(opened, "n_frames", 1)
        except Exception as error:  # counting frames walks through the file, which may end or break anywhere
            raise _as_drop(error) from None
        if frames > 1:
            raise Drop("animated", f"{frames} frames")


def _is_plain(opened: ImageFile.ImageFile) -> bool:
    """Whether the stored samples are already upright 8-bit gray or sRGB."""
    return (
        opened.mode in ("L", "RGB")
        and "transparency" not in opened.info
        and not _needs_profile(opened.info.get("icc_profile"))
        and _orientation(opened) == 1
    )


def _is_finished(data: bytes, opened: ImageFile.ImageFile, image: ImageConfig) -> bool:
    """Whether the file can be stored as it is: size, mode and format as configured, and no EXIF (it may hold a location)."""
    wanted = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[image.format]
    deep_png = opened.format == "PNG" and data[24] != 8  # bit depth of IHDR; Pillow shows 16-bit RGB as 8-bit
    return (
        opened.format == wanted
        and opened.size == (image.resolution, image.resolution)
        and opened.mode == ("L" if image.channels == 1 else "RGB")
        and "exif" not in opened.info
        and "icc_profile" not in opened.info
        and getattr(opened, "n_frames", 1) == 1
        and not deep_png
    )


def _decode_plain_jpeg(data: bytes, opened: ImageFile.ImageFile, image: ImageConfig) -> np.ndarray | None:
    """DCT-scaled to the smallest size that still needs no enlarging; None where libjpeg-turbo complains and Pillow decides."""
    side = image.resolution if min(opened.size) >= image.resolution else 0
    gray = image.channels == 1 or opened.mode == "L"
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY" if gray else "RGB", min_height=side, min_width=side)
    except ValueError:
        return None
    pixels = pixels[..., 0] if gray else pixels
    return np.repeat(pixels[..., None], 3, axis=2) if gray and image.channels == 3 else pixels


def _decode(opened: ImageFile.ImageFile, image: ImageConfig) -> np.ndarray:
    profile = opened.info.get("icc_profile")
    adobe = "adobe" in opened.info
    try:
        orientation = _orientation(opened)
        if opened.format == "JPEG" and opened.mode in ("L", "RGB"):
            opened.draft(opened.mode, (image.resolution, image.resolution))
        opened.load()
        picture = _to_eight_bit(opened, is_inverted=adobe)
        picture = _to_srgb(picture, profile) if _needs_profile(profile) else picture
        picture = _flatten(picture, image.matte)
        picture = picture.convert("L" if image.channels == 1 else "RGB")
        if orientation != 1:
            picture.getexif()[_ORIENTATION] = orientation
            picture = ImageOps.exif_transpose(picture)
        return np.asarray(picture)
    except Drop:
        raise
    except Exception as error:  # a broken file makes the decoders raise nearly anything; it costs this file only
        raise _as_drop(error) from None


def _to_eight_bit(opened: Image.Image, *, is_inverted: bool) -> Image.Image:
    """Any mode -> L, LA, RGB, RGBA or CMYK (in the sense that 0 is no ink)."""
    mode = opened.mode
    if mode == "CMYK" and opened.format in ("JPEG", "MPO") and not is_inverted:
        # Pillow inverts every CMYK JPEG; without Adobe's marker the values were not inverted to begin with.
        return Image.merge("CMYK", [channel.point(lambda level: 255 - level) for channel in opened.split()])
    if mode.startswith("I;16") or (mode == "I" and opened.format in ("PNG", "PPM")):
        # Scaled by 255/65535, not clipped as `convert("L")` does.
        levels = np.asarray(opened).astype(np.uint32)
        return Image.fromarray(((levels * 255 + 32_767) // 65_535).astype(np.uint8))
    if mode in ("P", "PA") or "transparency" in opened.info:
        has_alpha = mode == "PA" or "transparency" in opened.info
        return opened.convert("RGBA" if has_alpha else "RGB")
    if mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return opened
    if mode in ("1", "La", "RGBa", "RGBX", "YCbCr", "LAB"):
        return opened.convert({"1": "L", "La": "LA", "RGBa": "RGBA"}.get(mode, "RGB"))
    raise Drop("unsupported_mode", mode)


def _needs_profile(profile: bytes | None) -> bool:
    """Whether an embedded ICC profile says anything other than sRGB."""
    return bool(profile) and not any(name in (profile or b"")[:4096] for name in (b"sRGB", b"s\0R\0G\0B"))


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours through the embedded profile; a profile that is broken or of another colour space is ignored, as browsers do."""
    alpha = picture.getchannel("A") if "A" in picture.getbands() else None
    base = picture.convert({"LA": "L", "RGBA": "RGB"}[picture.mode]) if alpha is not None else picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        converted = ImageCms.profileToProfile(
            base, source, ImageCms.createProfile("sRGB"), renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    if converted is None:
        return picture
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _flatten(picture: Image.Image, matte: tuple[int, int, int]) -> Image.Image:
    if "A" not in picture.getbands():
        return picture
    background = Image.new("RGBA", picture.size, (*matte, 255))
    return Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")


def _orientation(opened: Image.Image) -> int:
    """EXIF orientation 1-8; 1 where there is none, or where the EXIF block cannot be read."""
    try:
        value: Any = opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF is untrusted bytes, and an image with broken EXIF is still a good image
        return 1
    return value if value in range(1, 9) else 1


def _as_drop(error: Exception) -> Drop:
    if isinstance(error, MemoryError):
        raise error
    text = f"{type(error).__name__}: {error}"[:200]
    if isinstance(error, Image.DecompressionBombError):
        return Drop("too_many_pixels", text)
    early = any(sign in text.lower() for sign in ("truncated", "unexpected end", "eof", "not enough", "incomplete"))
    return Drop("truncated" if early else "corrupt", text)
