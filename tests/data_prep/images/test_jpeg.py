"""The marker walk against Pillow's."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from data_prep.images.jpeg import exif_orientation, scan_jpeg
from tests.data_prep.conftest import encoded, smooth_pixels
from tests.data_prep.images.torture import segment, torture_cases, with_segments

FILES = [name for name, case in torture_cases().items() if case.data.startswith(b"\xff\xd8\xff") and not name.startswith("cut_in")]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", FILES)
def test_facts_are_those_that_pillow_finds(name: str) -> None:
    data = torture_cases()[name].data
    facts = scan_jpeg(data)
    assert facts is not None
    if facts.precision != 8:
        return  # Pillow refuses to look
    opened = Image.open(io.BytesIO(data))
    assert (facts.width, facts.height) == opened.size
    assert facts.num_components == len(opened.getbands())
    assert facts.is_complete
    assert facts.is_buffered == ("progressive" in opened.info)
    if facts.icc_profile is not None:
        assert facts.icc_profile == opened.info.get("icc_profile", b"")
    if facts.orientation is not None:
        assert facts.orientation == opened.getexif().get(0x0112, 1)
    if facts.is_bare:
        assert not {"exif", "xmp", "icc_profile", "photoshop", "mp", "comment"} & opened.info.keys()


def test_what_is_unusual_is_left_to_pillow() -> None:
    def found(name: str) -> tuple[object, object]:
        facts = scan_jpeg(torture_cases()[name].data)
        assert facts is not None
        return facts.orientation, facts.icc_profile

    assert found("plain.jpg") == (1, b"")
    assert found("exif_7.jpg") == (7, b"")
    assert found("exif_over_xmp.jpg") == (6, b"")
    assert found("turned_by_xmp.jpg")[0] is None
    assert found("huge_exif.jpg")[0] is None  # in several segments
    assert found("broken_exif.jpg")[0] is None
    assert found("icc_in_three_segments.jpg")[1] is None


def exif(order: str, *entries: bytes) -> bytes:
    """A TIFF header and one directory."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_of_exif_blocks(order: str) -> None:
    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        return struct.pack(order + "HHIH2x", tag, kind, count, value)

    right, other = entry(0x0112, 3, 1, 6), entry(0x0100, 3, 1, 9)
    assert exif_orientation(exif(order, right)) == 6
    assert exif_orientation(exif(order, other, right, other)) == 6
    assert exif_orientation(exif(order, other)) == 0
    assert exif_orientation(exif(order)) == 0
    for odd in (
        exif(order, entry(0x0112, 3, 1, 9)),
        exif(order, entry(0x0112, 4, 1, 6)),
        exif(order, entry(0x0112, 3, 2, 6)),
        exif(order, right, right),
        exif(order, right)[:15],
        exif(order)[:6],
        b"nonsense nonsense",
        b"",
    ):
        assert exif_orientation(odd) is None


def test_a_second_segment_of_a_kind_does_not_win_unseen() -> None:
    data = encoded(smooth_pixels(20, 30), "JPEG")
    frame = data[data.index(b"\xff\xc0") :][:19]
    other = frame[:5] + struct.pack(">HH", 9999, 9999) + frame[9:]
    twice = data.replace(frame, frame + other)
    facts = scan_jpeg(twice)
    assert facts is not None
    assert (facts.width, facts.height) == (30, 20)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xe0\0\1",
        b"\xff\xd8" + b"\xff" * 50,
        b"\xff\xd8\xff\xc0\0\x02",
        b"\xff\xd8\xff\xc0\0\x08\x08\0\1\0\1\0",
    ],
)
def test_no_frame_no_facts(data: bytes) -> None:
    assert scan_jpeg(data) is None


def test_wide_tables_and_several_in_one_segment() -> None:
    data = encoded(smooth_pixels(20, 30), "JPEG", quality=40)
    first = data.index(b"\xff\xdb")
    length = int.from_bytes(data[first + 2 : first + 4], "big")
    table = data[first + 5 : first + 5 + 64]
    wide = struct.pack(">64H", *table)
    for content in (b"\x10" + wide, b"\x01" + bytes([99] * 64) + b"\0" + table, b"\x11" + bytes(128) + b"\x10" + wide):
        facts = scan_jpeg(data[:first] + segment(0xDB, content) + data[first + 2 + length :])
        assert facts is not None
        assert facts.quality == 40
    assert scan_jpeg(with_segments(data, segment(0xDB, b"\0" + bytes(10)))) is not None


def test_random_bytes_behind_the_signature_never_raise() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        scan_jpeg(b"\xff\xd8\xff" + bytes(generator.choice([0, 1, 0xFF, 0xC0, 0xDA, 0xE1, 17], 60).astype(np.uint8)))
