"""Measures of source and picture."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep.config import FilterConfig
from data_prep.images.jpeg import scan_jpeg
from data_prep.images.quality import border_share, check_pixels, contrast, detail, jpeg_quality
from data_prep.reasons import Drop
from tests.data_prep.conftest import encoded, smooth_pixels
from tests.data_prep.images.torture import picture


class TestJpegQuality:
    @pytest.mark.parametrize("gray", [False, True])
    def test_what_pillow_wrote(self, gray: bool) -> None:
        small = Image.fromarray(smooth_pixels(8, 8)).convert("L" if gray else "RGB")
        files = {quality: encoded(small, "JPEG", quality=quality) for quality in range(1, 101)}
        assert {quality: jpeg_quality(Image.open(io.BytesIO(data)).quantization) for quality, data in files.items()} == {n: n for n in files}  # type: ignore[attr-defined]
        assert all((facts := scan_jpeg(data)) and facts.quality == quality for quality, data in files.items())

    def test_what_simplejpeg_wrote(self) -> None:
        for quality in range(1, 101):
            facts = scan_jpeg(simplejpeg.encode_jpeg(smooth_pixels(8, 8), quality=quality))
            assert facts is not None
            assert facts.quality == quality

    def test_another_rounding_is_forgiven_and_other_tables_are_not_guessed_at(self) -> None:
        table = list(Image.open(io.BytesIO(encoded(smooth_pixels(8, 8), "JPEG", quality=75))).quantization[0])  # type: ignore[attr-defined]
        table[10] += 1
        table[60] -= 1
        assert jpeg_quality({0: table}) == 75
        assert jpeg_quality({0: [16] * 64}) == -1
        assert jpeg_quality({0: [1] * 64}) == 100
        assert jpeg_quality({0: table[::-1]}) == -1
        assert jpeg_quality({1: table}) == -1
        assert jpeg_quality({0: table[:63]}) == -1
        assert jpeg_quality({}) == -1

    def test_a_whole_file_with_flat_tables_has_no_quality(self) -> None:
        facts = scan_jpeg(encoded(smooth_pixels(8, 8), "JPEG", qtables=[[20] * 64, [20] * 64]))
        assert facts is not None
        assert facts.quality == -1


def test_contrast_is_the_standard_deviation() -> None:
    luma = picture()[..., 1]
    assert contrast(luma) == pytest.approx(luma.std(), rel=1e-6)
    assert contrast(np.full((20, 20), 9, np.uint8)) == 0


class TestBorder:
    @pytest.mark.parametrize(("top", "bottom", "left", "right"), [(0, 0, 0, 0), (20, 0, 0, 0), (20, 12, 0, 0), (0, 0, 7, 30), (10, 10, 25, 25)])
    def test_shares_of_known_frames(self, top: int, bottom: int, left: int, right: int) -> None:
        luma = picture(100, 200)[..., 0].copy()
        luma[0, ::2], luma[-1, ::2], luma[::2, 0], luma[::2, -1] = 0, 0, 0, 0  # no line of the picture itself is constant
        luma[:top], luma[100 - bottom :] = 16, 235
        luma[:, :left], luma[:, 200 - right :] = 16, 16
        if top and left:
            luma[:top, :], luma[100 - bottom :] = 16, 16
        assert border_share(luma) == pytest.approx(max((top + bottom) / 100, (left + right) / 200))

    def test_jpeg_does_not_hide_a_border(self) -> None:
        pixels = picture(256, 256)
        pixels[:64] = 0
        luma = np.asarray(Image.open(io.BytesIO(encoded(pixels, "JPEG", quality=60))).convert("L"))
        assert 0.21 <= border_share(luma) <= 0.25

    def test_one_colour_is_all_border_and_a_fading_sky_is_none(self) -> None:
        assert border_share(np.full((30, 40), 200, np.uint8)) == 1
        assert border_share(np.tile(np.linspace(0, 255, 100).astype(np.uint8)[:, None], (1, 80))) < 0.1


class TestDetail:
    def photographs(self) -> list[np.ndarray]:
        datasets = pytest.importorskip("sklearn.datasets")
        return [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in datasets.load_sample_images().images]

    def stored(self, luma: np.ndarray, factor: float, quality: int) -> np.ndarray:
        """The centre at 256 pixels, having been a JPEG of 256 / factor pixels."""
        side = min(luma.shape)
        square = luma[:side, (luma.shape[1] - side) // 2 :][:, :side]
        small = cv2.resize(square, (round(256 / factor),) * 2, interpolation=cv2.INTER_AREA)
        small = np.asarray(Image.open(io.BytesIO(encoded(small, "JPEG", quality=quality))))
        return small if factor == 1 else np.asarray(cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC))

    @pytest.mark.parametrize("quality", [75, 95])
    def test_enlarged_photographs_are_told_from_originals(self, quality: int) -> None:
        for luma in self.photographs():
            assert detail(self.stored(luma, 1, quality)) > 45
            for factor in (2, 3, 4):
                assert detail(self.stored(luma, factor, quality)) < 31

    def test_any_shape_can_be_measured(self) -> None:
        for height, width in ((256, 256), (255, 301), (64, 500), (16, 16)):
            assert detail(picture(height, width)[..., 0]) > 0
        assert detail(np.full((64, 64), 7, np.uint8)) == 0
        assert detail(np.zeros((4, 100), np.uint8)) == 0

    def test_rounding_is_no_detail(self) -> None:
        assert detail(smooth_pixels(256, 256)[..., 0]) < 5


def test_bounds_are_inclusive_and_measures_come_in_order() -> None:
    pixels = picture(64, 64)
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    check_pixels(pixels, FilterConfig(min_contrast=contrast(luma), max_border=border_share(luma), min_detail=detail(luma)))
    check_pixels(luma, FilterConfig(min_contrast=contrast(luma)))
    with pytest.raises(Drop, match="blank"):
        check_pixels(np.zeros((64, 64, 3), np.uint8), FilterConfig(min_contrast=1, max_border=0.5, min_detail=1))
