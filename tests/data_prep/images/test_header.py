"""What the first bytes of a file say is what all of it says."""

import io
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from data_prep.config import FilterConfig, ImageConfig, LimitConfig
from data_prep.images.header import Header, is_cut_short, judge_header, read_header
from data_prep.images.prepare import prepare_image
from data_prep.reasons import Drop
from tests.data_prep.conftest import encoded, smooth_pixels
from tests.data_prep.images.torture import chunk, picture, torture_cases

IMAGE = ImageConfig(resolution=16, format="png")
LIMITS = LimitConfig()
FILTERS = FilterConfig(min_jpeg_quality=50)


def header_verdict(data: bytes, total: int | None, limits: LimitConfig = LIMITS, image: ImageConfig = IMAGE) -> str:
    """Reason that the header gives; empty if it gives none."""
    try:
        judge_header(data, total, image, limits, FILTERS)
    except Drop as drop:
        return drop.reason
    return ""


def whole_verdict(data: bytes, limits: LimitConfig = LIMITS) -> str:
    """Reason that the whole file gets; empty if it is kept."""
    try:
        prepare_image(data, IMAGE, limits, FILTERS, 400 * 2**20)
    except Drop as drop:
        return drop.reason
    return ""


def lengths(data: bytes) -> list[int]:
    """Prefix lengths: all the short ones, then ever fewer."""
    return sorted({*range(0, min(64, len(data))), *(int(64 * 1.3**step) for step in range(60) if 64 * 1.3**step < len(data)), len(data)})


def assert_agrees(data: bytes) -> int:
    """Every verdict on a prefix is that on the whole; returns the number of verdicts."""
    whole, verdicts = whole_verdict(data), 0
    for length in lengths(data):
        for total in {None, len(data)}:
            found = header_verdict(data[:length], total)
            verdicts += bool(found)
            assert found in ("", whole), f"{found} on {length} of {len(data)} bytes"
    return verdicts


def assert_grows(data: bytes) -> None:
    """A fact once known never changes."""
    known: dict[str, object] = {}
    for length in lengths(data):
        header = read_header(data[:length])
        if header is None:
            assert not known
            continue
        facts = {"format": header.format, "size": (header.width, header.height), "animated": header.is_animated}
        for name, value in facts.items():
            if value not in (None, (None, None)) or name == "format":
                assert known.setdefault(name, value) == value
        assert all(facts[name] == value for name, value in known.items())


@pytest.mark.parametrize("name", torture_cases())
def test_a_verdict_on_a_prefix_is_the_verdict_on_the_whole(name: str) -> None:
    case = torture_cases()[name]
    assert_agrees(case.data)
    assert_grows(case.data)
    if case.headed:
        assert header_verdict(case.data[:4096], len(case.data)) == case.reason


def test_the_same_for_spoiled_files() -> None:
    verdicts = 0
    for data in _spoiled():
        verdicts += assert_agrees(data)
        assert_grows(data)
    assert verdicts > 100


def _spoiled() -> Iterator[bytes]:
    frames = [Image.fromarray(smooth_pixels(24, 30, seed)) for seed in range(2)]
    grays = [frame.convert("L") for frame in frames]
    files = [encoded(frames[0], format) for format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")]
    files += [encoded(frames[0], format, save_all=True, append_images=frames[1:]) for format in ("PNG", "WEBP")]
    files += [encoded(grays[0], "GIF"), encoded(grays[0], "GIF", save_all=True, append_images=grays[1:]), encoded(frames[0], "JPEG", quality=10)]
    generator = np.random.default_rng(0)
    for data in files:
        for _ in range(25):
            changed = bytearray(data)
            for position in generator.integers(0, min(len(data), 300), int(generator.integers(1, 4))):
                changed[position] = int(generator.integers(256))
            yield bytes(changed)
        yield data[: int(generator.integers(1, len(data)))]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 70), (300, 17), (257, 511)])
def test_sizes_are_those_that_pillow_finds(format: str, width: int, height: int) -> None:
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {format}")
    picture = Image.fromarray(smooth_pixels(height, width))
    header = read_header(encoded(picture.convert("L") if format == "GIF" else picture, format))
    assert header is not None
    assert (header.format, header.width, header.height) == (format.lower(), width, height)
    assert header.is_animated in (False, None)


def test_sizes_of_the_rarer_kinds() -> None:
    soft = Image.fromarray(smooth_pixels(40, 50))
    for data in (
        encoded(soft, "WEBP", lossless=True),
        encoded(soft, "WEBP", exif=b"Exif\0\0" + bytes(20)),
        encoded(soft, "JPEG", progressive=True, icc_profile=bytes(100_000)),
        encoded(soft, "PNG", pnginfo=None, icc_profile=bytes(1000)),
    ):
        header = read_header(data)
        assert header is not None
        assert (header.width, header.height) == (50, 40)
    old_bitmap = b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 50, 40, 1, 24)
    assert read_header(old_bitmap) == Header(format="bmp", width=50, height=40, is_animated=False)


def test_the_first_frame_of_a_gif_may_exceed_its_screen() -> None:
    data = encoded(Image.new("L", (50, 40)), "GIF")
    narrow = data[:6] + struct.pack("<HH", 10, 10) + data[10:]
    header = read_header(narrow)
    assert header is not None
    assert (header.width, header.height) == (50, 40) == Image.open(io.BytesIO(narrow)).size


def test_a_long_exif_does_not_hide_the_size_of_a_jpeg() -> None:
    data = torture_cases()["huge_exif.jpg"].data
    frame = data.index(b"\xff\xc0")
    assert read_header(data[: frame + 4]) == Header(format="jpeg", is_animated=False)
    header = read_header(data[: frame + 20])
    assert header is not None
    assert (header.width, header.height) == (330, 240)


def test_the_size_of_the_file_is_judged_where_it_is_known() -> None:
    data, limits = encoded(picture(), "JPEG"), LimitConfig(max_file_bytes=1000)
    assert header_verdict(data[:100], 1001, limits) == "file_too_large"
    assert header_verdict(data[:100], 1000, limits) == ""
    assert header_verdict(data[:100], None, limits) == ""


def test_quality_is_judged_once_the_first_scan_is_reached() -> None:
    data = encoded(picture(), "JPEG", quality=40)
    assert header_verdict(data[:2000], None) == "low_quality"
    assert header_verdict(data[: data.index(b"\xff\xda")], None) == ""
    assert header_verdict(encoded(picture(), "JPEG", quality=60)[:2000], None) == ""


def test_animations_are_let_through_where_they_are_wanted() -> None:
    data = torture_cases()["three_frames.webp"].data
    wanted = ImageConfig(resolution=16, animated="first_frame")
    assert header_verdict(data, None) == "animated"
    assert header_verdict(data, None, image=wanted) == ""


def test_a_damaged_png_header_proves_nothing() -> None:
    good = encoded(picture(1, 1))
    assert header_verdict(good, None) == "too_small"
    assert header_verdict(good[:20] + b"\xff" + good[21:], None) == ""
    assert chunk(b"IHDR", good[16:29]) == good[8:33]


@pytest.mark.parametrize("start", [b"", b"\x89", b"\xff\xd8", b"GIF8", b"RIFF\0\0\0\0", b"RIFF\0\0\0\0WEB", b"\0\0\0\x20fty", b"I", b"P"])
def test_too_few_bytes_are_no_verdict_unless_they_are_all(start: bytes) -> None:
    assert header_verdict(start, None) == ""
    assert header_verdict(start, 1000) == ""
    assert header_verdict(start, len(start)) == "not_an_image"


@pytest.mark.parametrize("start", [b"<html", b'{"err', b"\0\0\0\x20moov", b"%PDF-", b"\n\n <h", b"Not found"])
def test_five_wrong_bytes_are_enough(start: bytes) -> None:
    assert header_verdict(start, None) == "not_an_image"


def test_no_bytes_whatever_break_the_reading() -> None:
    """Torture files with a few bytes changed near their beginning, cut anywhere: an answer or none, never an exception."""
    generator = np.random.default_rng(0)
    starts = [case.data[:3000] for case in torture_cases().values() if len(case.data) > 30]
    for _ in range(60):
        for start in starts:
            changed = bytearray(start)
            for position in generator.integers(0, min(len(start), 300), 4):
                changed[position] = generator.choice([0, 1, 8, 0xC0, 0xDA, 0xFF, int(generator.integers(256))])
            data = bytes(changed[: int(generator.integers(1, len(start) + 1))])
            header = read_header(data, len(data))
            assert header is not None
            is_cut_short(data, header.format or "")
