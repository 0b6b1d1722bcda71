"""Which image formats are taken, told by their first bytes; names and content types count for nothing."""

from typing import Literal

DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Pillow decoders that may see untrusted bytes (JPEG includes MPO)."""

EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "pnm"})
"""File names that are taken for images when a folder or a tar is listed."""

# Format -> (offset, bytes) pairs that must all match; a format may have several signatures.
_SIGNATURES: tuple[tuple[str, tuple[tuple[int, bytes], ...]], ...] = (
    ("jpeg", ((0, b"\xff\xd8\xff"),)),
    ("png", ((0, b"\x89PNG\r\n\x1a\n"),)),
    ("webp", ((0, b"RIFF"), (8, b"WEBP"))),
    ("gif", ((0, b"GIF87a"),)),
    ("gif", ((0, b"GIF89a"),)),
    ("avif", ((4, b"ftyp"), (8, b"avif"))),
    ("avif", ((4, b"ftyp"), (8, b"avis"))),
    ("avif", ((4, b"ftyp"), (8, b"mif1"))),
    ("avif", ((4, b"ftyp"), (8, b"msf1"))),
    ("tiff", ((0, b"II*\0"),)),
    ("tiff", ((0, b"MM\0*"),)),
    ("tiff", ((0, b"II+\0"),)),
    ("tiff", ((0, b"MM\0+"),)),
    ("bmp", ((0, b"BM"),)),
    *(("ppm", ((0, b"P" + kind + space),)) for kind in (b"4", b"5", b"6") for space in (b"\n", b" ", b"\r", b"\t")),
)


def sniff(prefix: bytes) -> str | Literal[False] | None:
    """Name of the format (`jpeg`, `png`, ...), False if it is certainly none of ours, None if more bytes are needed.

    Icons, SVG, HEIC, JPEG 2000, PPM written as text, text and web pages are none of ours.
    """
    if prefix.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    is_open = False
    for name, parts in _SIGNATURES:
        if all(prefix.startswith(sign, offset) for offset, sign in parts):
            return name
        is_open = is_open or all(sign.startswith(prefix[offset : offset + len(sign)]) for offset, sign in parts)
    return None if is_open else False
