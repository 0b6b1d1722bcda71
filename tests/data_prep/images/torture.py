"""Images of every awkward kind, made on the spot, each with what must become of it.

for name, case in torture_cases().items():
    case.data      # the file
    case.reason    # why it is dropped, "" if it is kept
    case.size      # (width, height) as shown
    case.pixels    # what it shows at its full size, uint8 [height, width, 3], where that is to be compared
"""

import base64
import functools
import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from tests.data_prep.conftest import encoded, smooth_pixels

WIDTH, HEIGHT = 330, 240


# `smooth_pixels(48, 64, seed=3)` at quality 80 through `jpegtran -arithmetic`: no Python package writes such files.
_ARITHMETIC = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00smF1_cBL1_cHO2L=cV5DE$j2?`Vr4-60&6c`v66c!d59VH(c8zUSR79cDjBPJ&)Dk&KsEif%8FeNA{DF534LjeZ|"
    "2MP!Z6AB6wC>j<TC@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@BBQ01*fPFaSUU0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or"
    "3<CiG0ucid06zf#0I?fs9xr)#RB3#f$~l%T&&N#aYxf~<I~uFB8vEt-h)7hzyv?(jr<RdjnJBd|o5o6M3teOMtg;Ln*dPvpI#x6t`lZ1PJkXkNZ`6y2Ov7&@"
    "BG({B^6*db+<B8(q|s*ktA`oy8%QpBILj3zH9-}ir$WAP@Bl}xe4W3EZ5c^V5pcKl<hP%ozCo~a?LcFbs5aEtMcx+9CeG*~=wzbeeB!!oMu4c~{{S3*t|7}@"
    "VWT$pdkLU&ozdbzrhL2vG7mfk$xNy`>3wWLY02CTwjDT*ok$&CWU8XnefT~%yva8XU1jh4;E{GmmxTUc6mb;*K4J%CwuEnA;eB~!1t(epTh`>$O~wcdIlkQ7"
    "L(}z}aV2^G0E^4eZSGfrmiHTQBw{Zxb7e%P6D-+pF7UVvS=a<It72yaY^<NbKvIm=upd0&Ek<LPjYO`WgK`}6%*wn4awHxgW+Q`&@eUa}w5!&BDK_Kuzhv8<"
    "Q(wwX5wMBN>YR)~s`Xu<^5iRhgUd<Cq#8raSL}<z{Bvn4FDCInI{k?JiS79fN3S1Ie%5O~gmj_?H8e7+SiyvS=Afl2Xkh=@"
)


@dataclass(frozen=True, slots=True)
class Case:
    """A file and its verdict."""

    data: bytes
    reason: str = ""
    size: tuple[int, int] | None = None
    pixels: np.ndarray | None = None
    format: str = ""
    mean: float = 2.0
    """Grey levels by which the result may differ from the reference on average."""
    headed: bool = False
    """Whether the first 4 KiB must be enough for the verdict."""


@functools.cache
def torture_cases() -> dict[str, Case]:
    """Name -> case."""
    return {**_jpegs(), **_odd_jpegs(), **_pngs(), **_others(), **_broken(), **_animated(), **_bombs(), **_no_images()}


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Something like a photograph, uint8 [height, width, 3]: soft shades, sharp edges, fine texture."""
    pixels = smooth_pixels(height, width, seed).astype(np.int16)
    generator = np.random.default_rng(seed)
    for _ in range(12):
        top, left = int(generator.integers(height)), int(generator.integers(width))
        pixels[top : top + height // 6, left : left + width // 9] += generator.integers(-60, 60, 3, dtype=np.int16)
    pixels += generator.normal(0, 3, pixels.shape).astype(np.int16)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def shown(data: bytes) -> np.ndarray:
    """Pillow's own reading: first frame, turned by its EXIF."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def kept(data: bytes, pixels: np.ndarray | None = None, **settings: Any) -> Case:
    """A case that is kept and looks as Pillow shows it, or as `pixels`."""
    pixels = shown(data) if pixels is None else pixels
    return Case(data, size=(pixels.shape[1], pixels.shape[0]), pixels=pixels, **settings)


def oriented(orientation: int, format: str, pixels: np.ndarray | None = None) -> bytes:
    """A picture with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture() if pixels is None else pixels, format, exif=exif, **({"quality": 95} if format in ("JPEG", "WEBP", "AVIF") else {}))


def segment(marker: int, content: bytes) -> bytes:
    """A JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with further segments behind its first two bytes."""
    return data[:2] + b"".join(segments) + data[2:]


def patched(data: bytes, marker: int, offset: int, new: bytes) -> bytes:
    """A JPEG whose first segment of this kind is changed; offset -1 is the marker itself."""
    start = data.index(bytes([0xFF, marker])) + 2 + offset
    return data[:start] + new + data[start + len(new) :]


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def black_png(width: int, height: int, channels: int = 1) -> bytes:
    """A whole, valid PNG of zeros, of any size at once: one block of zeros is compressed and then repeated."""
    size = height * (1 + width * channels)
    block = 2**20
    packer = zlib.compressobj(9)
    head = packer.compress(b"") or b"\x78\xda"
    packer = zlib.compressobj(9, wbits=-15)
    repeated = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, wbits=-15)
    last = packer.compress(bytes(size % block)) + packer.flush()
    checksum = struct.pack(">HH", size % 65_521, 1)  # Adler-32 of zeros
    content = head[:2] + repeated * (size // block) + last + checksum
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def matrix_profile(primaries: tuple[tuple[float, float, float], ...], gamma: float) -> bytes:
    """An ICC profile of three primaries (XYZ adapted to D50) and one gamma."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + b"\0\0"
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {name: b"XYZ " + struct.pack(">I3i", 0, *(round(part * 65_536) for part in xyz)) for name, xyz in zip(names, primaries, strict=True)}
    tags |= {b"wtpt": b"XYZ " + struct.pack(">I3i", 0, 63_190, 65_536, 54_061), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags[b"desc"] = b"desc" + struct.pack(">II", 0, 5) + b"wide\0" + bytes(78)
    tags[b"cprt"] = b"text" + struct.pack(">I", 0) + b"none\0\0\0\0"
    table, content, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", start + len(content), len(value))
        content += value
    head = struct.pack(">I4sI4s4s4s12x4s", start + len(content), b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63_190, 65_536, 54_061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
"""Primaries of Display P3."""


def from_p3(pixels: np.ndarray) -> np.ndarray:
    """Display P3 of gamma 2.2 as sRGB, worked out in floating point."""
    srgb = np.array(((0.4360747, 0.3850649, 0.1430804), (0.2225045, 0.7168786, 0.0606169), (0.0139322, 0.0971045, 0.7141733)))
    linear = (pixels / 255.0) ** 2.2 @ np.array(P3) @ np.linalg.inv(srgb).T
    linear = np.clip(linear, 0, 1)
    return np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).astype(np.uint8)


def _jpegs() -> dict[str, Case]:
    pixels = picture()
    cases = {f"exif_{number}.jpg": kept(oriented(number, "JPEG"), format="jpeg") for number in range(1, 9)}
    for name, options in {
        "plain": {},
        "half_colour": {"subsampling": "4:2:0"},
        "progressive": {"progressive": True},
        "low_quality": {"quality": 30},
        "optimised": {"optimize": True},
        "restarts": {"restart_marker_blocks": 5},
        "rgb_stored": {"keep_rgb": True},
    }.items():
        cases[f"{name}.jpg"] = kept(encoded(pixels, "JPEG", **{"quality": 92, **options}), format="jpeg")
    gray = Image.fromarray(pixels).convert("L")
    cases["gray.jpg"] = kept(encoded(gray, "JPEG", quality=92))
    cases["gray_progressive.jpg"] = kept(encoded(gray, "JPEG", quality=92, progressive=True))
    soft = smooth_pixels(HEIGHT, WIDTH)
    cmyk = encoded(Image.fromarray(soft).convert("CMYK"), "JPEG", quality=95)
    cases["cmyk_adobe_inverted.jpg"] = kept(cmyk, soft, mean=3)
    negative = encoded(Image.fromarray(255 - soft).convert("CMYK"), "JPEG", quality=95)
    start = negative.index(b"\xff\xee")
    cases["cmyk_without_adobe.jpg"] = Case(negative[:start] + negative[start + 16 :], size=(WIDTH, HEIGHT))
    wide = encoded(pixels, "JPEG", quality=95, icc_profile=matrix_profile(P3, 2.2))
    cases["display_p3.jpg"] = kept(wide, from_p3(shown(wide)))
    padded = matrix_profile(P3, 2.2)
    padded = struct.pack(">I", 150_000) + padded[4:].ljust(149_996, b"\0")
    large = encoded(pixels, "JPEG", quality=95, icc_profile=padded)
    cases["icc_in_three_segments.jpg"] = kept(large, from_p3(shown(large)))
    cases["large_photo.jpg"] = kept(encoded(picture(1200, 1700), "JPEG", quality=90), mean=1)
    return cases


def _odd_jpegs() -> dict[str, Case]:
    plain, turned = encoded(picture(), "JPEG", quality=92), oriented(6, "JPEG")
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(2)]
    large = [Image.fromarray(smooth_pixels(1500, 2000, seed)) for seed in range(2)]
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='1' tiff:Orientation=\"6\"/>"
    more_exif = segment(0xE1, b"Exif\0\0" + bytes(60_000))
    stuffing = [segment(0xED, b"Photoshop 3.0\0" + bytes(65_000)) for _ in range(5)]
    stop = turned.index(b"\xff\xe1") + 2
    stop += int.from_bytes(turned[stop : stop + 2], "big")
    return {
        "arithmetic.jpg": kept(base64.b85decode(_ARITHMETIC), smooth_pixels(48, 64, seed=3), mean=4),
        "large_view_with_extra_bytes.mpo": kept(_padded_scan(encoded(large[0], "MPO", save_all=True, append_images=large[1:], quality=92))),
        "two_views.mpo": kept(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=92), format="jpeg"),
        "turned_by_xmp.jpg": kept(with_segments(plain, segment(0xE1, xmp))),
        "exif_over_xmp.jpg": kept(turned[:stop] + segment(0xE1, xmp.replace(b'"6"', b'"3"')) + turned[stop:]),
        "huge_exif.jpg": kept(turned[:stop] + more_exif * 4 + b"".join(stuffing) + turned[stop:]),
        "broken_exif.jpg": kept(with_segments(plain, segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff garbage"))),
        "broken_icc.jpg": kept(encoded(picture(), "JPEG", quality=92, icc_profile=b"no profile")),
        "fill_bytes.jpg": kept(plain[:2] + b"\xff\xff\xff" + plain[2:]),
        "trailing_garbage.jpg": kept(plain + bytes(1000)),
        "lossless_process.jpg": Case(patched(plain, 0xC0, -1, b"\xc3"), "unsupported_mode"),
        "twelve_bits.jpg": Case(patched(plain, 0xC0, 2, b"\x0c"), "unsupported_mode"),
        "endless_scans.jpg": Case(
            encoded(picture(), "JPEG", progressive=True).replace(b"\xff\xd9", b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 5000), "corrupt"
        ),
    }


def _padded_scan(data: bytes) -> bytes:
    """A JPEG with stray bytes before its end, of which libjpeg-turbo warns and which everyone shows."""
    end = data.index(b"\xff\xd9", data.index(b"\xff\xda"))
    return data[:end] + bytes(9) + data[end:]


def _pngs() -> dict[str, Case]:
    pixels = picture()
    rgb = Image.fromarray(pixels)
    gray = rgb.convert("L")
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    alpha = ramp[..., None] / 255.0
    over_white = np.rint(pixels * alpha + 255 * (1 - alpha)).astype(np.uint8)
    see_through, gray_through = rgb.copy(), gray.copy()
    see_through.putalpha(Image.fromarray(ramp))
    gray_through.putalpha(Image.fromarray(ramp))
    gray_over_white = np.rint(np.asarray(gray)[..., None] * alpha + 255 * (1 - alpha)).astype(np.uint8).repeat(3, axis=2)
    palette = Image.fromarray((ramp // 64).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    colours = np.array([(255, 255, 255), (0, 255, 0), (0, 0, 255), (9, 9, 9)], np.uint8)[ramp // 64]
    deep = np.linspace(0, 65_535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    deep_rgb = np.stack([deep, deep[::-1], deep[:, ::-1]], axis=-1)
    bits = np.asarray(gray) > 128
    keyed = pixels.copy()
    keyed[:100] = (1, 2, 3)
    keyed_white = keyed.copy()
    keyed_white[:100] = 255
    return {
        "plain.png": kept(encoded(pixels), format="png"),
        "png_called.jpg": kept(encoded(pixels), format="png"),
        "rgba.png": kept(encoded(see_through), over_white),
        "la.png": kept(encoded(gray_through), gray_over_white),
        "palette_trns.png": kept(encoded(palette, "PNG", transparency=0), colours),
        "rgb_trns.png": kept(encoded(keyed, "PNG", transparency=(1, 2, 3)), keyed_white),
        "gray_16.png": kept(encoded(Image.fromarray(deep)), np.rint(deep / 257.0).astype(np.uint8)[..., None].repeat(3, axis=2)),
        "rgb_16.png": kept(bytes(cv2.imencode(".png", deep_rgb[..., ::-1])[1]), (deep_rgb // 257).astype(np.uint8)),
        "one_bit.png": kept(encoded(Image.fromarray(bits).convert("1")), (bits * 255).astype(np.uint8)[..., None].repeat(3, axis=2)),
        "display_p3.png": kept(encoded(pixels, icc_profile=matrix_profile(P3, 2.2)), from_p3(pixels)),
        "turned.png": kept(oriented(6, "PNG")),
        "trailing_garbage.png": kept(encoded(pixels) + b"garbage"),
        "without_end.png": kept(encoded(pixels)[:-12]),
        "large_gray.png": Case(black_png(8000, 5000), size=(8000, 5000), pixels=np.zeros((50, 80, 3), np.uint8)),
        "large_colour.png": Case(black_png(8000, 6000, 3), size=(8000, 6000), pixels=np.zeros((60, 80, 3), np.uint8)),
    }


def _others() -> dict[str, Case]:
    pixels = picture()
    rgb = Image.fromarray(pixels)
    soft = smooth_pixels(HEIGHT, WIDTH)
    flipped = encoded(pixels, "BMP")
    flipped = flipped[:22] + struct.pack("<i", -HEIGHT) + flipped[26:]  # rows from the top: the same bytes, upside down
    exif = Image.Exif()
    exif[0x0112] = 6
    cases = {
        "lossy.webp": kept(encoded(pixels, "WEBP", quality=90), format="webp"),
        "lossless.webp": kept(encoded(pixels, "WEBP", lossless=True)),
        "turned.webp": kept(oriented(8, "WEBP")),
        "still.gif": kept(encoded(rgb.convert("P", dither=Image.Dither.NONE), "GIF"), format="gif"),
        "plain.bmp": kept(encoded(pixels, "BMP"), format="bmp"),
        "from_the_top.bmp": kept(flipped, pixels[::-1]),
        "palette.bmp": kept(encoded(rgb.convert("P", dither=Image.Dither.NONE), "BMP")),
        "plain.tiff": kept(encoded(pixels, "TIFF"), format="tiff"),
        "lzw.tiff": kept(encoded(pixels, "TIFF", compression="tiff_lzw")),
        "turned.tiff": kept(encoded(pixels, "TIFF", exif=exif), np.rot90(pixels, -1)),
        "cmyk.tiff": kept(encoded(Image.fromarray(soft).convert("CMYK"), "TIFF"), soft, mean=3),
        "float.tiff": Case(encoded(Image.fromarray(np.ones((64, 64), np.float32)), "TIFF"), "unsupported_mode"),
        "plain.ppm": kept(encoded(pixels, "PPM"), format="ppm"),
        "plain.pgm": kept(encoded(rgb.convert("L"), "PPM")),
    }
    Image.init()
    if "AVIF" in Image.SAVE:
        cases["plain.avif"] = kept(encoded(pixels, "AVIF", quality=90), format="avif", mean=4)
        cases["turned.avif"] = kept(oriented(6, "AVIF"), mean=4)
        cases["half.avif"] = Case(cases["plain.avif"].data[: len(cases["plain.avif"].data) // 2], "truncated")
    return cases


def _broken() -> dict[str, Case]:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    cases = {}
    for name, format, options in (
        ("plain.jpg", "JPEG", {}),
        ("progressive.jpg", "JPEG", {"progressive": True}),
        ("plain.png", "PNG", {}),
        ("plain.webp", "WEBP", {}),
        ("gray.gif", "GIF", {}),
        ("plain.bmp", "BMP", {}),
        ("plain.tiff", "TIFF", {}),
    ):
        data = encoded(noise[..., 0] if format == "GIF" else noise, format, **options)
        for share in (50, 99):
            cases[f"cut_at_{share}_{name}"] = Case(data[: len(data) * share // 100], "truncated")
    png = encoded(picture())
    middle = png.index(b"IDAT") + 5000
    cases["flipped_bits.png"] = Case(png[:middle] + b"\0\1\2\3" + png[middle + 4 :], "corrupt")
    cases["cut_in_header.jpg"] = Case(encoded(noise, "JPEG")[:100], "truncated")
    cases["cut_in_header.png"] = Case(png[:20], "truncated")
    cases["huge_icc.png"] = Case(png[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20 * 2**20), 9)) + png[33:], "corrupt")
    return cases


def _animated() -> dict[str, Case]:
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    cases = {}
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        pictures = [frame.convert("L") for frame in frames] if format == "GIF" else frames
        data = encoded(pictures[0], format, save_all=True, append_images=pictures[1:], duration=100)
        cases[f"three_frames.{format.lower()}"] = Case(data, "animated", headed=format in ("PNG", "WEBP"))
    return cases


def _bombs() -> dict[str, Case]:
    jpeg = encoded(picture(), "JPEG")
    gif = encoded(Image.fromarray(picture()).convert("P"), "GIF")
    webp = encoded(picture(), "WEBP", exif=b"Exif\0\0" + bytes(20))
    bmp = encoded(picture(), "BMP")
    return {
        "pixel.png": Case(encoded(picture(1, 1)), "too_small", headed=True),
        "pixel.gif": Case(encoded(Image.new("P", (1, 1)), "GIF"), "too_small", headed=True),
        "line.png": Case(encoded(picture(10, 5000)), "aspect_ratio", headed=True),
        "line.jpg": Case(encoded(picture(10, 5000), "JPEG"), "aspect_ratio", headed=True),
        "bomb_30000.png": Case(black_png(30_000, 30_000), "too_many_pixels", headed=True),
        "bomb_65000.png": Case(black_png(65_000, 65_000), "too_many_pixels", headed=True),
        "over_the_budget.png": Case(black_png(9900, 9900, 3), "too_many_pixels"),
        "bomb.jpg": Case(patched(jpeg, 0xC0, 3, struct.pack(">HH", 65_500, 65_500)), "too_many_pixels", headed=True),
        "bomb.gif": Case(gif[:6] + b"\xff\xff\xff\xff" + gif[10:], "too_many_pixels", headed=True),
        "bomb.webp": Case(webp[:24] + b"\xff\x3f\0\xff\x3f\0" + webp[30:], "too_many_pixels", headed=True),
        "bomb_tiles.tiff": Case(_tiled(30_000), "too_many_pixels"),
        "bomb.bmp": Case(bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:], "too_many_pixels", headed=True),
    }


def _tiled(side: int) -> bytes:
    """A small TIFF that says that its only tile is so large."""
    tags = {256: 100, 257: 100, 258: 8, 259: 5, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(200, b"\0") + bytes(100)


def _no_images() -> dict[str, Case]:
    texts = {
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "spaces_page.jpg": b"\n\n  <html></html>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='90' height='90'/>",
        "xml_drawing.svg": b"\xef\xbb\xbf<?xml version='1.0'?><svg/>",
        "note.txt": b"not found",
        "answer.json": b'{"error": 404}',
        "icon.ico": encoded(Image.fromarray(picture(64, 64)), "ICO"),
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500),
        "film.mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(500),
        "paper.pdf": b"%PDF-1.7\n" + bytes(500),
        "zeros.jpg": bytes(1000),
        "written_out.ppm": b"P3\n2 1\n255\n1 2 3 4 5 6\n",
        "sound.wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(500),
    }
    return {name: Case(data, "not_an_image", headed=True) for name, data in texts.items()}
