"""Images of every kind: the right pixels, or a stable reason and never an exception of another type."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from data_prep.config import FilterConfig, ImageConfig, LimitConfig
from data_prep.images.encode import decode_stored
from data_prep.images.phash import phash
from data_prep.images.prepare import PreparedImage, prepare_image
from data_prep.images.resize import fit
from data_prep.reasons import REASONS, Drop
from tests.data_prep.conftest import encoded, smooth_pixels

PNG_16 = ImageConfig(resolution=16, format="png")
PNG_64 = ImageConfig(resolution=64, format="png")
LIMITS = LimitConfig(min_side=1)


def prepare(data: bytes, image: ImageConfig, limits: LimitConfig = LIMITS) -> PreparedImage:
    """Without filters, within 1 GiB."""
    return prepare_image(data, image, limits, FilterConfig(), 2**30)


def crop_and_resize(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The centred square, resized."""
    return fit(pixels, ImageConfig(resolution=resolution))


def prepared(data: bytes, image: ImageConfig = PNG_64, limits: LimitConfig = LIMITS) -> np.ndarray:
    """Pixels of the prepared image as signed integers."""
    return decode_stored(prepare(data, image, limits).data).astype(int)


def reason(data: bytes, image: ImageConfig = PNG_64, limits: LimitConfig = LIMITS) -> str:
    """Why `data` is dropped."""
    with pytest.raises(Drop) as caught:
        prepare(data, image, limits)
    assert caught.value.reason in REASONS
    return caught.value.reason


def assert_close(found: np.ndarray, expected: np.ndarray, mean: float = 2.0) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected.astype(int)).mean() <= mean


def jpeg_with_orientation(pixels: np.ndarray, orientation: int, format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, format, exif=exif, **({"quality": 98} if format in ("JPEG", "WEBP") else {}))


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG of this announced size whose content is one row of zeros."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1000)))


class TestGeometry:
    @pytest.mark.parametrize("resolution", [16, 64])
    def test_agrees_with_resize_shorter_side_then_centre_crop(self, resolution: int) -> None:
        pixels = smooth_pixels(120, 180)  # both resolutions cut a whole number of pixels from this shape
        size = (180 * resolution // 120, resolution)
        resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        left = (size[0] - resolution) // 2
        assert_close(crop_and_resize(pixels, resolution).astype(int), resized[:, left : left + resolution], mean=3.0)

    def test_enlarges_small_images(self) -> None:
        pixels = smooth_pixels(20, 20)
        assert_close(prepared(encoded(pixels)), cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_CUBIC), mean=0)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_exif_orientation_is_applied(self, orientation: int, format: str) -> None:
        data = jpeg_with_orientation(smooth_pixels(96, 128), orientation, format)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert_close(prepared(data), crop_and_resize(upright, 64))

    def test_broken_exif_does_not_cost_the_image(self) -> None:
        data = encoded(smooth_pixels(64, 64), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
        assert prepared(data).shape == (64, 64, 3)


class TestColour:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
    def test_every_format_gives_the_same_picture(self, format: str) -> None:
        pixels = smooth_pixels(90, 130)
        options: dict[str, Any] = {"quality": 98} if format in ("JPEG", "WEBP", "AVIF") else {}
        try:
            data = encoded(pixels, format, **options)
        except (KeyError, OSError):
            pytest.skip(f"this Pillow does not write {format}")
        assert_close(prepared(data), crop_and_resize(pixels, 64), mean=3.0)

    def test_progressive_and_gray_jpegs(self) -> None:
        pixels = smooth_pixels(300, 300)
        assert_close(prepared(encoded(pixels, "JPEG", quality=95, progressive=True)), crop_and_resize(pixels, 64))
        gray = Image.fromarray(pixels).convert("L")
        assert_close(prepared(encoded(gray, "JPEG", quality=95)), crop_and_resize(np.asarray(gray.convert("RGB")), 64))

    def test_one_channel_output_is_luma(self) -> None:
        image = ImageConfig(resolution=64, format="png", channels=1)
        pixels = smooth_pixels(200, 200)
        luma = crop_and_resize(np.asarray(Image.fromarray(pixels).convert("L")), 64)
        for format in ("PNG", "JPEG"):
            found = prepared(encoded(pixels, format, **({"quality": 98} if format == "JPEG" else {})), image)
            assert_close(found, luma)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_alpha_is_laid_over_the_matte(self, mode: str) -> None:
        picture = Image.fromarray(smooth_pixels(64, 64)).convert(mode)
        picture.putalpha(Image.fromarray(np.tile(np.repeat([0, 128, 255, 255], 16).astype(np.uint8), (64, 1))))
        found = prepared(encoded(picture), ImageConfig(resolution=64, format="png", matte=(10, 200, 30)))
        assert (found[:, :16] == (10, 200, 30)).all()
        assert_close(found[:, 32:], np.asarray(picture.convert("RGB"))[:, 32:], mean=0)
        half = (np.asarray(picture.convert("RGB"))[:, 16:32].astype(int) * 128 + np.array([10, 200, 30]) * 127) / 255
        assert_close(found[:, 16:32], half.round(), mean=1)

    def test_palette_with_transparency(self) -> None:
        picture = Image.new("P", (64, 64))
        picture.putpalette([255, 0, 0, 0, 0, 255])
        picture.paste(1, (0, 0, 32, 64))
        found = prepared(encoded(picture, "PNG", transparency=1))
        assert (found[:, :32] == 255).all()
        assert (found[:, 32:] == (255, 0, 0)).all()

    def test_rgb_png_with_a_transparent_colour(self) -> None:
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[:32] = (9, 9, 9)
        found = prepared(encoded(pixels, "PNG", transparency=(9, 9, 9)))
        assert (found[:32] == 255).all()
        assert (found[32:] == 0).all()

    def test_sixteen_bit_gray_is_scaled_not_clipped(self) -> None:
        levels = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
        found = prepared(encoded(Image.fromarray(levels)), ImageConfig(resolution=64, format="png", channels=1))
        np.testing.assert_array_equal(found, np.rint(levels / 257.0).astype(int))

    def test_sixteen_bit_rgb_is_scaled_and_not_kept_as_it_is(self) -> None:
        levels = np.random.default_rng(0).integers(0, 65_536, (64, 64, 3), dtype=np.uint16)
        data = bytes(cv2.imencode(".png", levels[..., ::-1])[1])
        stored = prepare(data, PNG_64).data
        assert stored[24] == 8
        assert_close(decode_stored(stored).astype(int), levels // 257, mean=1)

    def test_bilevel(self) -> None:
        picture = Image.fromarray(smooth_pixels(64, 64)[..., 0] > 128).convert("1")
        assert set(np.unique(prepared(encoded(picture)))) == {0, 255}

    @pytest.mark.parametrize("format", ["JPEG", "TIFF"])
    def test_cmyk(self, format: str) -> None:
        picture = Image.fromarray(smooth_pixels(64, 64))
        data = encoded(picture.convert("CMYK"), format, **({"quality": 98} if format == "JPEG" else {}))
        assert_close(prepared(data), np.asarray(picture), mean=3.0)

    def test_cmyk_jpeg_without_adobe_marker_is_not_inverted(self) -> None:
        """Pillow writes Adobe's marker and inverted ink; without the marker the same ink means the negative."""
        picture = Image.fromarray(smooth_pixels(64, 64))
        data = encoded(ImageOps.invert(picture).convert("CMYK").point(lambda level: level), "JPEG", quality=98)
        ink = np.asarray(Image.open(io.BytesIO(data)))
        start = data.index(b"\xff\xee")
        plain = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]
        assert b"Adobe" not in plain
        expected = np.asarray(Image.merge("CMYK", [Image.fromarray(255 - ink[..., channel]) for channel in range(4)]).convert("RGB"))
        assert_close(prepared(plain), expected, mean=3.0)

    @pytest.mark.parametrize("format", ["JPEG", "PNG"])
    def test_icc_profile_is_applied(self, format: str) -> None:
        """A profile whose red and green primaries have changed places: the decoder must change them back."""
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        swapped = profile.replace(b"rXYZ", b"tmp_").replace(b"gXYZ", b"rXYZ").replace(b"tmp_", b"gXYZ")
        swapped = swapped.replace(b"sRGB", b"xxxx").replace("sRGB".encode("utf-16-be"), "xxxx".encode("utf-16-be"))
        pixels = smooth_pixels(64, 64)
        data = encoded(pixels, format, icc_profile=swapped, **({"quality": 98} if format == "JPEG" else {}))
        assert_close(prepared(data), pixels[..., [1, 0, 2]], mean=4.0)
        assert_close(prepared(encoded(pixels, "PNG", icc_profile=profile)), pixels, mean=0)

    def test_broken_icc_profile_is_ignored(self) -> None:
        pixels = smooth_pixels(64, 64)
        assert_close(prepared(encoded(pixels, "PNG", icc_profile=b"no profile")), pixels, mean=0)

    def test_float_tiff_is_dropped(self) -> None:
        assert reason(encoded(Image.fromarray(np.ones((64, 64), np.float32)), "TIFF")) == "unsupported_mode"


class TestLimits:
    def test_limits_are_checked_on_the_header(self) -> None:
        assert reason(png_header(30_000, 30_000)) == "too_many_pixels"
        assert reason(png_header(65_000, 65_000)) == "too_many_pixels"
        assert reason(png_header(5_000, 10), limits=LimitConfig(max_aspect_ratio=8.0, min_side=1)) == "aspect_ratio"
        assert reason(png_header(7, 100), limits=LimitConfig(min_side=8)) == "too_small"
        assert reason(png_header(200, 200), limits=LimitConfig(max_pixels=39_999)) == "too_many_pixels"

    def test_limits_are_inclusive(self) -> None:
        data = encoded(smooth_pixels(8, 64))
        assert prepared(data, limits=LimitConfig(max_pixels=512, max_aspect_ratio=8.0, min_side=8)).shape == (64, 64, 3)


class TestBadFiles:
    @pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", bytes(1000), b"\0\0\1\0\1\0"])
    def test_what_is_no_image(self, data: bytes) -> None:
        assert reason(data) == "not_an_image"

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    @pytest.mark.parametrize("share", [0.5, 0.99])
    def test_truncated_files(self, format: str, share: float) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        data = encoded(noise, format)
        assert reason(data[: int(len(data) * share)]) == "truncated"

    def test_every_cut_and_every_flipped_bit_ends_in_a_picture_or_a_reason(self) -> None:
        for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
            data = encoded(smooth_pixels(24, 24), format)
            generator = np.random.default_rng(0)
            spoiled = [data[: int(cut)] for cut in generator.integers(0, len(data), 40)]
            for position in generator.integers(0, min(len(data), 400), 60):
                changed = bytearray(data)
                changed[position] ^= 1 << int(generator.integers(8))
                spoiled.append(bytes(changed))
            reasons = set()
            for candidate in spoiled:
                try:
                    assert prepared(candidate, PNG_16).shape == (16, 16, 3)
                except Drop as drop:
                    reasons.add(drop.reason)
            assert reasons
            assert reasons <= set(REASONS)

    @pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_animations_are_dropped_or_cut_to_their_first_frame(self, format: str) -> None:
        frames = [Image.fromarray(smooth_pixels(64, 64, seed)) for seed in range(3)]
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {}))
        assert reason(data) == "animated"
        found = prepared(data, ImageConfig(resolution=64, format="png", animated="first_frame"))
        assert_close(found, np.asarray(frames[0]), mean=8.0 if format == "GIF" else 0)

    def test_a_phones_two_picture_jpeg_is_no_animation(self) -> None:
        frames = [Image.fromarray(smooth_pixels(64, 64, seed)) for seed in range(2)]
        data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=98)
        result = prepare(data, PNG_64)
        assert result.format == "jpeg"
        assert_close(decode_stored(result.data).astype(int), np.asarray(frames[0]))


class TestStoring:
    @pytest.mark.parametrize(("format", "pillow"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_finished_images_keep_their_bytes(self, format: Any, pillow: str, channels: int) -> None:
        if channels == 1 and format == "webp":
            pytest.skip("WebP has no gray")
        pixels = smooth_pixels(64, 64)
        data = encoded(Image.fromarray(pixels).convert("L" if channels == 1 else "RGB"), pillow)
        image = ImageConfig(resolution=64, format=format, channels=channels)
        assert prepare(data, image).data == data

    def test_a_location_in_exif_is_not_kept(self) -> None:
        exif = Image.Exif()
        exif[0x8825] = {1: "N"}
        data = encoded(smooth_pixels(64, 64), "JPEG", exif=exif)
        stored = prepare(data, ImageConfig(resolution=64, format="jpg")).data
        assert b"Exif" in data
        assert b"Exif" not in stored

    def test_a_png_without_its_end_is_not_kept(self) -> None:
        data = encoded(smooth_pixels(64, 64))[:-8]
        assert prepare(data, PNG_64).data != data

    def test_original_size_and_format_are_reported(self) -> None:
        result = prepare(encoded(smooth_pixels(50, 70), "JPEG"), PNG_16)
        assert (result.width, result.height, result.format) == (70, 50, "jpeg")

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
    def test_the_size_is_that_of_the_picture_as_it_is_shown(self, orientation: int, format: str) -> None:
        result = prepare(jpeg_with_orientation(smooth_pixels(50, 70), orientation, format), PNG_16)
        assert (result.width, result.height) == ((70, 50) if orientation < 5 else (50, 70))

    def test_quality_and_hash_are_reported(self) -> None:
        pixels = smooth_pixels(100, 100)
        result = prepare(encoded(pixels, "JPEG", quality=71), PNG_64)
        assert result.jpeg_quality == 71
        assert result.phash == phash(decode_stored(result.data))
        assert prepare(encoded(pixels), PNG_64).jpeg_quality == -1

    @pytest.mark.parametrize("segment", [b"\xff\xe1\0\x20http://ns.adobe.com/xap/1.0/\0x", b"\xff\xed\0\x08photos", b"\xff\xfe\0\x08my cat"])
    def test_a_jpeg_with_any_metadata_is_written_anew(self, segment: bytes) -> None:
        data = encoded(smooth_pixels(64, 64), "JPEG")
        image = ImageConfig(resolution=64, format="jpg")
        assert prepare(data, image).data == data
        stored = prepare(data[:2] + segment + data[2:], image).data
        assert segment not in stored
        assert_close(decode_stored(stored).astype(int), decode_stored(data))


class TestKeepRatio:
    def test_the_whole_picture_is_kept_and_upright(self) -> None:
        pixels = smooth_pixels(120, 210)
        image = ImageConfig(resolution=32, format="png", resize_mode="keep_ratio")
        expected = cv2.resize(pixels, (56, 32), interpolation=cv2.INTER_AREA)
        assert_close(prepared(encoded(pixels), image), expected)
        assert_close(prepared(encoded(pixels, "JPEG", quality=98), image), expected)
        turned = jpeg_with_orientation(np.rot90(pixels), 6)
        assert_close(prepared(turned, image), expected)

    def test_a_finished_picture_keeps_its_bytes(self) -> None:
        data = encoded(smooth_pixels(32, 56))
        image = ImageConfig(resolution=32, format="png", resize_mode="keep_ratio")
        assert prepare(data, image).data == data
        assert prepare(data, ImageConfig(resolution=32, format="png")).data != data


class TestFilters:
    def reason(self, data: bytes, **settings: float) -> str:
        """Why the picture is dropped; empty if it is kept."""
        try:
            prepare_image(data, PNG_64, LIMITS, FilterConfig(**settings), 2**30)  # type: ignore[arg-type]
        except Drop as drop:
            return drop.reason
        return ""

    def test_each_has_its_reason_and_is_off_by_default(self) -> None:
        flat, framed = np.full((64, 64, 3), 77, np.uint8), smooth_pixels(64, 64).copy()
        framed[:20] = 0
        soft = smooth_pixels(64, 64)
        poor = encoded(soft, "JPEG", quality=30)
        for data, reason, settings in (
            (encoded(flat), "blank", {"min_contrast": 4.0}),
            (encoded(framed), "border", {"max_border": 0.3}),
            (encoded(soft), "upscaled", {"min_detail": 32.0}),
            (poor, "low_quality", {"min_jpeg_quality": 31}),
        ):
            assert self.reason(data) == ""
            assert self.reason(data, **settings) == reason
        assert self.reason(poor, min_jpeg_quality=30) == ""
        assert self.reason(encoded(framed), max_border=0.32) == ""
        assert self.reason(encoded(soft), min_jpeg_quality=100) == ""


class TestMemory:
    @pytest.mark.parametrize(("format", "most"), [("PNG", 120), ("WEBP", 200), ("JPEG", 80)])
    def test_what_would_not_fit_is_dropped_before_it_is_decoded(self, format: str, most: int) -> None:
        data = encoded(Image.new("RGB", (3000, 2000)), format)
        assert prepare_image(data, PNG_16, LIMITS, FilterConfig(), most * 2**20).width == 3000
        with pytest.raises(Drop, match="too_many_pixels") as caught:
            prepare_image(data, PNG_16, LIMITS, FilterConfig(), 48 * 2**20)
        assert "MiB" in caught.value.detail

    def test_a_progressive_jpeg_needs_all_its_coefficients(self) -> None:
        data = encoded(Image.new("RGB", (3000, 2000)), "JPEG", progressive=True, subsampling=0)
        with pytest.raises(Drop, match="too_many_pixels"):
            prepare_image(data, PNG_16, LIMITS, FilterConfig(), 80 * 2**20)
        assert prepare_image(data, PNG_16, LIMITS, FilterConfig(), 90 * 2**20).height == 2000

    def test_a_large_picture_is_shrunk_in_bands_to_the_same_picture(self) -> None:
        pixels = smooth_pixels(2200, 2600)
        for mode in ("center_crop", "keep_ratio"):
            image = ImageConfig(resolution=32, format="png", resize_mode=mode)  # type: ignore[arg-type]
            expected = fit(pixels, image).astype(int)
            assert_close(prepared(encoded(pixels, "PNG", compress_level=1), image), expected, mean=0.5)
