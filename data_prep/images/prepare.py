"""One image of one sample, from its bytes as found to its bytes as stored."""

import warnings
from dataclasses import dataclass

from PIL import ImageFile

from data_prep.config import FilterConfig, ImageConfig, LimitConfig
from data_prep.images.decode import check_header, decode_any, decode_plain_jpeg, is_plain, open_image, orientation_of
from data_prep.images.encode import encode
from data_prep.images.phash import phash
from data_prep.images.quality import jpeg_quality
from data_prep.images.resize import fit, fitted_size
from data_prep.reasons import Drop

_PNG_END = b"IEND\xaeB`\x82"


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


def prepare_image(data: bytes, image: ImageConfig, limits: LimitConfig, filters: FilterConfig, memory_bytes: int) -> PreparedImage:
    """Checks, decodes, cuts, resizes, judges and encodes one image.

    Args:
        memory_bytes: budget of the task; a picture whose decoding would need more is dropped before it is decoded.

    Raises:
        Drop: with the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes that we judge ourselves
        opened = open_image(data)
        width, height = opened.size
        if len(data) + 8 * width * height > memory_bytes:
            raise Drop("too_many_pixels", f"{width}x{height} would not fit in ray.memory_per_task_bytes")
        check_header(opened, image, limits)
        plain = is_plain(opened)
        is_jpeg = opened.format in ("JPEG", "MPO")
        quality = jpeg_quality(getattr(opened, "quantization", {})) if is_jpeg else -1
        if 0 < quality < filters.min_jpeg_quality:
            raise Drop("low_quality", f"JPEG quality {quality}")
        if orientation_of(opened) >= 5:
            width, height = height, width
        fast = decode_plain_jpeg(data, opened, image) if plain and is_jpeg else None
        pixels = fast if fast is not None else decode_any(opened, image)
    fitted = fit(pixels, image)
    source_format = "jpeg" if is_jpeg else str(opened.format).lower()
    is_sound = fast is not None if is_jpeg else opened.format != "PNG" or data.endswith(_PNG_END)
    is_kept = plain and is_sound and _is_finished(data, opened, image)
    return PreparedImage(
        data=data if is_kept else encode(fitted, image),
        width=width,
        height=height,
        format=source_format,
        jpeg_quality=quality,
        phash=phash(fitted),
    )


def _is_finished(data: bytes, opened: ImageFile.ImageFile, image: ImageConfig) -> bool:
    """Whether the file can be stored as it is: size, mode and format as configured, and no EXIF (it may hold a location)."""
    wanted = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[image.format]
    deep_png = opened.format == "PNG" and data[24] != 8  # bit depth of IHDR; Pillow shows 16-bit RGB as 8-bit
    return (
        opened.format == wanted
        and opened.size == fitted_size(*opened.size, image)
        and opened.mode == ("L" if image.channels == 1 else "RGB")
        and "exif" not in opened.info
        and "icc_profile" not in opened.info
        and getattr(opened, "n_frames", 1) == 1
        and not deep_png
    )
