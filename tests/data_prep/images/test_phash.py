"""The perceptual hash against its definition, and against imagehash where that is installed."""

import numpy as np
import pytest
from PIL import Image

from data_prep.images.phash import distance, phash, phash_32
from tests.data_prep.conftest import encoded, smooth_pixels
from tests.data_prep.images.torture import picture, shown


def reference(gray: np.ndarray) -> int:
    """The definition, written down slowly: no fast transform, no shortcuts."""
    places = np.arange(32)
    waves = np.array([[2 * np.cos(np.pi * k * (2 * n + 1) / 64) for n in places] for k in places])
    low = (waves @ gray.astype(float) @ waves.T)[:8, :8]
    bits = (low > np.median(low)).ravel()
    return sum(1 << (63 - place) for place, bit in enumerate(bits) if bit)


def grays() -> list[np.ndarray]:
    """Noise, and pictures shrunk as imagehash does."""
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (32, 32), dtype=np.uint8) for _ in range(200)]
    pictures = [Image.fromarray(picture(seed=seed)).convert("L").resize((32, 32), Image.Resampling.LANCZOS) for seed in range(50)]
    return noise + [np.asarray(image) for image in pictures]


def test_bits_are_those_of_the_definition() -> None:
    for gray in grays():
        assert phash_32(gray) == reference(gray)


def test_bits_are_those_of_scipy_and_imagehash() -> None:
    imagehash = pytest.importorskip("imagehash")
    for gray in grays():
        assert f"{phash_32(gray):016x}" == str(imagehash.phash(Image.fromarray(gray)))


def test_whole_pictures_come_within_four_bits_of_imagehash() -> None:
    """It shrinks with a Lanczos filter and rounds luma otherwise; the definition is the same."""
    imagehash = pytest.importorskip("imagehash")
    for seed in range(30):
        pixels = picture(256, 256, seed)
        assert distance(phash(pixels), int(str(imagehash.phash(Image.fromarray(pixels))), 16)) <= 4


@pytest.mark.parametrize("level", [0, 1, 100, 255])
def test_blank_pictures_have_a_hash_without_noise(level: int) -> None:
    assert phash(np.full((64, 64, 3), level, np.uint8)) == (1 << 63 if level else 0)


def test_near_copies_are_near_and_others_are_far() -> None:
    for seed in range(5):
        pixels = picture(256, 256, seed)
        mine = phash(pixels)
        smaller = np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC))
        poorer = shown(encoded(pixels, "JPEG", quality=30))
        assert distance(mine, phash(smaller)) <= 4
        assert distance(mine, phash(poorer)) <= 4
        assert distance(mine, phash(picture(256, 256, seed + 100))) > 16


def test_gray_and_colour_agree() -> None:
    gray = smooth_pixels(100, 140)[..., 0]
    assert phash(gray) == phash(gray[..., None].repeat(3, axis=2))
