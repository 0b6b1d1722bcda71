"""The markers of a JPEG up to its first scan: all that decides how it is decoded, at a tenth of the price of opening it.

What is unusual is reported as unknown, never guessed, so that a caller can ask Pillow instead.
"""

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from data_prep.images.quality import jpeg_quality

SUPPORTED = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
"""Start-of-frame markers that libjpeg decodes: baseline, extended, progressive, and the latter two arithmetic-coded."""

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_METADATA = frozenset({*range(0xE1, 0xF0), 0xFE} - {0xEE})
_ORIENTATION = 0x0112

# Row-by-row position of each of the 64 values in zigzag order.
_ZIGZAG = tuple(sorted(range(64), key=lambda place: (sum(divmod(place, 8)), place % 8 if sum(divmod(place, 8)) % 2 == 0 else place // 8)))


@dataclass(frozen=True, slots=True, kw_only=True)
class JpegFacts:
    """What the header says. Width and height hold as soon as they are seen; the rest once `is_complete`."""

    width: int
    """Of the stored samples, before any rotation."""
    height: int
    process: int
    """Marker of the frame: 0xC0 baseline, 0xC2 progressive, ..."""
    precision: int
    """Bits per sample."""
    num_components: int
    """1 gray, 3 colour, 4 CMYK."""
    samples_per_pixel: float
    """1.5 for 4:2:0, 3 for 4:4:4."""
    is_complete: bool
    """Whether the first scan was reached."""
    is_buffered: bool
    """Whether the decoder must hold all coefficients: progressive, or several scans."""
    orientation: int | None
    """EXIF orientation, 1-8; None where only a full EXIF and XMP reader can tell."""
    icc_profile: bytes | None
    """Empty if there is none; None if it is spread over several segments."""
    is_bare: bool
    """Whether no EXIF, XMP, IPTC or other metadata is there (JFIF and Adobe's colour marker do not count)."""
    quality: int
    """See `quality.jpeg_quality`."""


class _Frame(NamedTuple):
    process: int
    precision: int
    width: int
    height: int
    num_components: int
    samples_per_pixel: float


def scan_jpeg(data: bytes) -> JpegFacts | None:
    """Walks the markers of a JPEG file or of its beginning; None until the frame header is seen, or if there is none."""
    frame: _Frame | None = None
    table, exif, xmp = b"", b"", b""
    profiles: list[bytes] = []
    is_bare, is_complete, is_buffered, num_exif = True, False, False, 0
    for marker, start, stop in _segments(data):
        if marker == 0xDB:
            table = _luma_table(data[start:stop]) or table
        elif marker in _FRAMES:
            frame = frame or _read_frame(marker, data[start:stop])
            if frame is None:
                return None
        elif marker == 0xDA:
            is_complete = frame is not None
            is_buffered = frame is not None and (frame.process in (0xC2, 0xCA) or data[start] < frame.num_components)
        elif marker in _METADATA:
            is_bare = False
            if marker == 0xE1 and data.startswith(b"Exif\0\0", start):
                exif, num_exif = data[start + 6 : stop], num_exif + 1
            elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start):
                xmp = data[start:stop]
            elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", start):
                profiles.append(data[start + 14 : stop])
    if frame is None:
        return None
    return JpegFacts(
        width=frame.width,
        height=frame.height,
        process=frame.process,
        precision=frame.precision,
        num_components=frame.num_components,
        samples_per_pixel=frame.samples_per_pixel,
        is_complete=is_complete,
        is_buffered=is_buffered,
        orientation=_orientation(exif, num_exif, xmp),
        icc_profile=b"" if not profiles else profiles[0] if len(profiles) == 1 else None,
        is_bare=is_bare,
        quality=_quality(table),
    )


def exif_orientation(exif: bytes) -> int | None:
    """Orientation 1-8 in the first directory of an EXIF block (a TIFF header and what follows); 0 without one; None if malformed."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (offset,) = struct.unpack_from(order + "I", exif, 4)
    if offset + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, offset)
    if offset + 2 + 12 * count > len(exif):
        return None
    found = 0
    wanted = struct.pack(order + "HHI", _ORIENTATION, 3, 1)
    for entry in range(offset + 2, offset + 2 + 12 * count, 12):
        if exif.startswith(wanted[:2], entry):
            (value,) = struct.unpack_from(order + "H", exif, entry + 8)
            if found or not exif.startswith(wanted, entry) or not 1 <= value <= 8:
                return None
            found = value
    return found


def _orientation(exif: bytes, num_exif: int, xmp: bytes) -> int | None:
    found = exif_orientation(exif) if num_exif == 1 else 0 if num_exif == 0 else None
    if found == 0:
        return None if b"tiff:Orientation" in xmp else 1
    return found


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of the content of every whole segment up to the first scan header, which is the last one given."""
    position, end = 2, len(data)
    while position + 4 <= end:
        marker = data[position + 1]
        if data[position] != 0xFF:
            position = data.find(b"\xff", position)  # libjpeg too passes over what stands between segments
            if position < 0:
                return
        elif marker == 0xFF:
            position += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
        else:
            stop = position + 2 + (data[position + 2] << 8 | data[position + 3])
            if marker == 0xD9 or stop < position + 5 or stop > end:
                return
            yield marker, position + 4, stop
            if marker == 0xDA:
                return
            position = stop


def _read_frame(marker: int, segment: bytes) -> _Frame | None:
    if len(segment) < 6:
        return None
    precision, height, width, components = struct.unpack_from(">BHHB", segment)
    factors = [(byte >> 4) * (byte & 15) for byte in segment[7 : 6 + 3 * components : 3]]
    if (
        not (width and height and components) or len(factors) != components or not all(factors)
    ):  # height 0: given after the first scan; nobody does that
        return None
    return _Frame(marker, precision, width, height, components, sum(factors) / max(factors))


def _luma_table(segment: bytes) -> bytes:
    """The 64 values of table 0 as 8 or 16-bit numbers in zigzag order, empty if the segment does not define it."""
    position = 0
    while position < len(segment):
        is_wide, number = segment[position] >> 4, segment[position] & 15
        size = 128 if is_wide else 64
        if number == 0:
            return segment[position + 1 : position + 1 + size]
        position += 1 + size
    return b""


@functools.lru_cache(maxsize=1024)
def _quality(table: bytes) -> int:
    if len(table) not in (64, 128):
        return -1
    values = struct.unpack(">64H", table) if len(table) == 128 else tuple(table)
    rows = [0] * 64
    for place, value in zip(_ZIGZAG, values, strict=True):
        rows[place] = value
    return jpeg_quality({0: rows})
