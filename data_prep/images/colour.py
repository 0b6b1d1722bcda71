"""Pixels of any kind -> 8-bit gray or sRGB."""

import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from data_prep.reasons import Drop


def to_display(picture: Image.Image, info: Mapping[Any, Any], matte: tuple[int, int, int], *, is_inverted: bool) -> Image.Image:
    """A picture of any mode as L or RGB: 8 bits, through its ICC profile, and laid over the matte where it is transparent.

    Args:
        info: the `info` of the opened file.
        is_inverted: whether this is CMYK from a JPEG without Adobe's marker, which Pillow has inverted for nothing.

    Raises:
        Drop: unsupported_mode.
    """
    picture = _to_eight_bit(picture, info, is_inverted=is_inverted)
    picture = to_srgb(picture, info.get("icc_profile") or b"")
    if "A" in picture.getbands():
        background = Image.new("RGBA", picture.size, (*matte, 255))
        picture = Image.alpha_composite(background, picture.convert("RGBA"))
    return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")


def is_foreign(profile: bytes) -> bool:
    """Whether an embedded ICC profile says anything other than sRGB."""
    return bool(profile) and not any(name in profile[:4096] for name in (b"sRGB", b"s\0R\0G\0B"))


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Colours through a foreign ICC profile; one that is broken or of another colour space is ignored, as browsers do."""
    if not is_foreign(profile):
        return picture
    alpha = picture.getchannel("A") if "A" in picture.getbands() else None
    base = picture.convert({"LA": "L", "RGBA": "RGB"}[picture.mode]) if alpha is not None else picture
    transform = _transform(profile, base.mode)
    if transform is None:
        return picture
    try:
        converted = ImageCms.applyTransform(base, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    if converted is None:
        return picture
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; cached, because a few profiles of cameras and editors are in most of the files that have one."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _to_eight_bit(picture: Image.Image, info: Mapping[Any, Any], *, is_inverted: bool) -> Image.Image:
    """Any mode -> L, LA, RGB, RGBA or CMYK (in the sense that 0 is no ink)."""
    mode = picture.mode
    if mode == "CMYK" and is_inverted:
        return Image.merge("CMYK", [channel.point(lambda level: 255 - level) for channel in picture.split()])
    if mode.startswith("I;16") or mode == "I":
        # Scaled by 255/65535, not clipped as `convert("L")` does.
        levels = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((levels * 255 + 32_767) // 65_535).astype(np.uint8))
    if mode in ("P", "PA") or "transparency" in info:
        has_alpha = mode == "PA" or "transparency" in info
        return picture.convert("RGBA" if has_alpha else "RGB")
    if mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return picture
    if mode in ("1", "La", "RGBa", "RGBX", "YCbCr", "LAB"):
        return picture.convert({"1": "L", "La": "LA", "RGBa": "RGBA"}.get(mode, "RGB"))
    raise Drop("unsupported_mode", mode)
