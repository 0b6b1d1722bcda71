"""Format, size and animation of an image, from its first kilobytes.

Everything here is certain: a fact read from the beginning of a file is the fact read from all of it, so a download can be given
up on a verdict that the whole file would get as well. `prepare_image` asks the same functions first. What the bytes at hand do
not settle is None.
"""

import struct
import zlib
from dataclasses import dataclass

from data_prep.config import FilterConfig, ImageConfig, LimitConfig
from data_prep.images.formats import sniff
from data_prep.images.jpeg import JpegFacts, scan_jpeg
from data_prep.reasons import Drop


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the first bytes say."""

    format: str | None
    """`jpeg`, `png`, `webp`, `gif`, `avif`, `tiff`, `bmp`, `ppm`; None: certainly no image that we take."""
    width: int | None = None
    """Of the stored samples, before any rotation; never 0. Both sides are known or neither is."""
    height: int | None = None
    is_animated: bool | None = None
    """Whether it declares itself a sequence of pictures. The second view in a phone's JPEG does not count."""
    jpeg: JpegFacts | None = None


def read_header(prefix: bytes, total: int | None = None) -> Header | None:
    """What is certain from the first bytes of a file, or from all of them.

    Args:
        total: bytes of the whole file if known; only tells whether `prefix` is all of it.

    Returns:
        None if not even the format is certain.
    """
    found = sniff(prefix)
    if found is None and total is not None and len(prefix) >= total:
        found = False
    if found is None:
        return None
    if found is False:
        return Header(format=None)
    if found == "jpeg":
        facts = scan_jpeg(prefix)
        if facts is None:
            return Header(format="jpeg", is_animated=False)
        return Header(format="jpeg", width=facts.width, height=facts.height, is_animated=False, jpeg=facts)
    reader = _READERS.get(found)
    size, is_animated = reader(prefix) if reader is not None else (None, None)
    if size is None or min(size) < 1:
        return Header(format=found)
    return Header(format=found, width=size[0], height=size[1], is_animated=is_animated)


def judge_header(prefix: bytes, total: int | None, image: ImageConfig, limits: LimitConfig, filters: FilterConfig | None = None) -> None:
    """Gives an image up on its first bytes, if it is certain that the whole of it would be dropped for the same reason.

    Args:
        prefix: the first bytes, or all.
        total: bytes of the whole file, if known.
        filters: with it, `min_jpeg_quality` is judged too.

    Raises:
        Drop: file_too_large, not_an_image, too_many_pixels, too_small, aspect_ratio, animated, or low_quality.
    """
    if total is not None and total > limits.max_file_bytes:
        raise Drop("file_too_large", f"{total} bytes")
    header = read_header(prefix, total)
    if header is not None:
        judge(header, prefix, image, limits, filters)


def judge(header: Header, prefix: bytes, image: ImageConfig, limits: LimitConfig, filters: FilterConfig | None = None) -> None:
    """As `judge_header`, of a header that has been read."""
    if header.format is None:
        raise Drop("not_an_image", repr(prefix[:16]) if prefix else "empty file")
    if header.width is None or header.height is None:
        return
    judge_size(header.width, header.height, limits)
    if header.is_animated and image.animated == "drop":
        raise Drop("animated", header.format)
    if filters is not None and header.jpeg is not None and header.jpeg.is_complete and 0 < header.jpeg.quality < filters.min_jpeg_quality:
        raise Drop("low_quality", f"JPEG quality {header.jpeg.quality}")


def judge_size(width: int, height: int, limits: LimitConfig) -> None:
    """Checks a size in pixels against the limits.

    Raises:
        Drop: too_many_pixels, too_small or aspect_ratio.
    """
    size = f"{width}x{height}"
    if width * height > limits.max_pixels:
        raise Drop("too_many_pixels", size)
    if min(width, height) < max(1, limits.min_side):
        raise Drop("too_small", size)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise Drop("aspect_ratio", size)


def is_cut_short(data: bytes, format: str) -> bool:
    """Whether the container of a whole file announces more bytes than there are; only for the formats whose decoders do not say so."""
    if format == "webp":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    if format == "avif":
        boxes = _boxes(data, 0, len(data))
        return not boxes or boxes[-1][2] < len(data) or b"mdat" not in {kind for kind, _, _ in boxes}
    return False


_Size = tuple[int, int]


def _png(data: bytes) -> tuple[_Size | None, bool | None]:
    if len(data) < 33 or data[8:16] != b"\0\0\0\rIHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return None, None
    size = struct.unpack_from(">II", data, 16)
    position = 33
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            return size, False
        if kind == b"acTL":
            frames = int.from_bytes(data[position + 8 : position + 12], "big")
            return size, True if 1 < frames < 2**31 else None  # one frame, or none: Pillow's rules for odd files decide
        position += 12 + length
    return size, None


def _gif(data: bytes) -> tuple[_Size | None, bool | None]:
    size: _Size | None = None
    try:
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        position = 13 + _colours(flags)
        while True:
            kind = data[position]
            if kind == 0x21:
                position = _after_blocks(data, position + 2)
            elif kind == 0x2C and size is not None:
                return size, True
            elif kind == 0x2C:
                left, top, across, down, flags = struct.unpack_from("<HHHHB", data, position + 1)
                size = (max(width, left + across), max(height, top + down))  # as Pillow: the first frame may exceed the screen
                position = _after_blocks(data, position + 11 + _colours(flags))
            else:
                return size, False if kind == 0x3B and size is not None else None
    except (IndexError, struct.error):
        return size, None


def _colours(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(data: bytes, position: int) -> int:
    """Behind the chain of sub-blocks that starts here."""
    while length := data[position]:
        position += 1 + length
    return position + 1


def _webp(data: bytes) -> tuple[_Size | None, bool | None]:
    kind = data[12:16]
    if len(data) < 30:
        return None, None
    if kind == b"VP8X":
        return (int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1), bool(data[20] & 2)
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), False
    if kind == b"VP8 " and not data[20] & 1 and data[23:26] == b"\x9d\x01\x2a":
        return (int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF), False
    return None, None


def _bmp(data: bytes) -> tuple[_Size | None, bool | None]:
    if len(data) < 26:
        return None, None
    kind = int.from_bytes(data[14:18], "little")
    if kind == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    elif kind in (40, 52, 56, 64, 108, 124):
        width, height = struct.unpack_from("<ii", data, 18)
    else:
        return None, None
    return (width, abs(height)) if width > 0 else None, False


def _tiff(data: bytes) -> tuple[_Size | None, bool | None]:
    """The first page, where its directory is among the bytes at hand."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] not in (b"*\0", b"\0*"):
        return None, None  # BigTIFF
    try:
        (offset,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, offset)
        (following,) = struct.unpack_from(order + "I", data, offset + 2 + 12 * count)
        sides = {}
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", data, entry)
            if tag in (256, 257) and values == 1 and kind in (3, 4):
                sides[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)[0]
    except struct.error:
        return None, None
    if len(sides) < 2:
        return None, None
    return (sides[256], sides[257]), None if following else False


def _avif(data: bytes) -> tuple[_Size | None, bool | None]:
    """Size of the primary item, where the `meta` box is among the bytes at hand; `avis` files are sequences."""
    try:
        for kind, start, stop in _boxes(data, 0, len(data)):
            if kind == b"meta":
                return _primary_size(data, start + 4, stop), True if data[8:12] == b"avis" else None
    except (IndexError, KeyError, struct.error):
        pass
    return None, None


def _primary_size(data: bytes, start: int, stop: int) -> _Size | None:
    boxes = {kind: (begin, end) for kind, begin, end in _boxes(data, start, stop)}
    place = boxes[b"pitm"][0]
    primary = int.from_bytes(data[place + 4 : place + (8 if data[place] else 6)], "big")
    inner = {kind: (begin, end) for kind, begin, end in _boxes(data, *boxes[b"iprp"])}
    properties = list(_boxes(data, *inner[b"ipco"]))
    place = inner[b"ipma"][0]
    id_size, index_size = (4 if data[place] else 2), (2 if data[place + 3] & 1 else 1)
    (entries,) = struct.unpack_from(">I", data, place + 4)
    place += 8
    for _ in range(entries):
        item, count = int.from_bytes(data[place : place + id_size], "big"), data[place + id_size]
        place += id_size + 1
        for _ in range(count):
            index = int.from_bytes(data[place : place + index_size], "big") & (0x7FFF if index_size == 2 else 0x7F)
            place += index_size
            if item == primary and 0 < index <= len(properties) and properties[index - 1][0] == b"ispe":
                width, height = struct.unpack_from(">II", data, properties[index - 1][1] + 4)
                return width, height
    return None


def _boxes(data: bytes, start: int, stop: int) -> list[tuple[bytes, int, int]]:
    """(kind, start, stop) of the content of every box that ends by `stop`."""
    found = []
    while start + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1 and content + 8 <= stop:
            (size,) = struct.unpack_from(">Q", data, content)
            content += 8
        if size < content - start or start + size > stop:
            break
        found.append((kind, content, start + size))
        start += size
    return found


_READERS = {"png": _png, "gif": _gif, "webp": _webp, "bmp": _bmp, "tiff": _tiff, "avif": _avif}
