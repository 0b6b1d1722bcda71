"""Image bytes of any origin -> 8-bit gray or sRGB pixels, or a reason why not.

The header is read first (Pillow opens lazily and trusts magic bytes, not names), the limits are checked on it, and only
then is anything decoded. Plain JPEGs, most of the web, go through simplejpeg, which scales by 1/2, 1/4, 1/8 while decoding;
everything else and every odd JPEG (EXIF rotation, CMYK, foreign ICC profile) goes through Pillow.
Arrays are uint8 [height, width] or [height, width, 3] (RGB).
"""

import functools
import io
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from data_prep.config import ImageConfig, LimitConfig
from data_prep.images.formats import DECODERS
from data_prep.reasons import Drop

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `DECODERS` that the installed Pillow can read (AVIF came with 11.3)."""
    Image.init()
    return tuple(name for name in DECODERS if name in Image.OPEN)


def open_image(data: bytes) -> ImageFile.ImageFile:
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


def check_header(opened: ImageFile.ImageFile, image: ImageConfig, limits: LimitConfig) -> None:
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


def is_plain(opened: ImageFile.ImageFile) -> bool:
    """Whether the stored samples are already upright 8-bit gray or sRGB."""
    return (
        opened.mode in ("L", "RGB")
        and "transparency" not in opened.info
        and not _needs_profile(opened.info.get("icc_profile"))
        and orientation_of(opened) == 1
    )


def decode_plain_jpeg(data: bytes, opened: ImageFile.ImageFile, image: ImageConfig) -> np.ndarray | None:
    """DCT-scaled to the smallest size that still needs no enlarging; None where libjpeg-turbo complains and Pillow decides."""
    side = image.resolution if min(opened.size) >= image.resolution else 0
    gray = image.channels == 1 or opened.mode == "L"
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY" if gray else "RGB", min_height=side, min_width=side)
    except ValueError:
        return None
    pixels = pixels[..., 0] if gray else pixels
    return np.repeat(pixels[..., None], 3, axis=2) if gray and image.channels == 3 else pixels


def decode_any(opened: ImageFile.ImageFile, image: ImageConfig) -> np.ndarray:
    profile = opened.info.get("icc_profile")
    adobe = "adobe" in opened.info
    try:
        orientation = orientation_of(opened)
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


def orientation_of(opened: Image.Image) -> int:
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
