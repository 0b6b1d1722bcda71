"""The Hamming search is exact, and hashes that tell nothing are recognised."""

import cv2
import numpy as np
import pytest

from data_prep.dedup import image
from data_prep.dedup.image import Scheme, choose_scheme, is_telling, matches, matches_in_table, shuffled_bits
from data_prep.dedup.pairs import popcount
from data_prep.images.phash import phash
from tests.data_prep.dedup.planted import flipped, telling_hashes


def brute_force(hashes: np.ndarray, distance: int, num_fixed: int = 0, fixed_only: bool = False) -> set[tuple[int, int, int]]:
    later, earlier = np.tril_indices(len(hashes), -1)
    bits = popcount(hashes[later] ^ hashes[earlier])
    wanted = (bits <= distance) & (later >= num_fixed) & ((earlier < num_fixed) | (not fixed_only))
    return set(zip(later[wanted].tolist(), earlier[wanted].tolist(), bits[wanted].tolist(), strict=True))


def clustered(count: int, seed: int) -> np.ndarray:
    """Half of them random, half around a few centres, 0 to 8 bits away."""
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, 2**64, count // 10, dtype=np.uint64)
    near = centres[generator.integers(0, len(centres), count // 2)]
    for most in range(8):
        near[most::8] = flipped(near[most::8], most, generator)
    hashes = np.concatenate([generator.integers(0, 2**64, count - len(near), dtype=np.uint64), near])
    generator.shuffle(hashes)
    return hashes


def as_set(found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> set[tuple[int, int, int]]:
    return set(zip(*(column.tolist() for column in found), strict=True))


@pytest.mark.parametrize("distance", range(8))
@pytest.mark.parametrize(("num_fixed", "fixed_only"), [(0, False), (300, False), (300, True)])
def test_every_close_pair_is_found_once(distance: int, num_fixed: int, fixed_only: bool) -> None:
    hashes = clustered(1000, distance)
    found = matches(hashes, distance, num_fixed=num_fixed, fixed_only=fixed_only)
    expected = brute_force(hashes, distance, num_fixed, fixed_only)
    assert len(expected) > 5
    assert len(found[0]) == len(expected)
    assert as_set(found) == expected


@pytest.mark.parametrize("num_equal", [1, 2, 3])
@pytest.mark.parametrize("distance", [1, 4, 6, 7])
def test_tables_report_disjoint_pairs_that_together_are_all(distance: int, num_equal: int) -> None:
    hashes, scheme = shuffled_bits(clustered(600, distance)), Scheme(distance=distance, num_equal=num_equal)
    found = [as_set(match) for table in range(scheme.num_tables) for match in matches_in_table(hashes, scheme, table)]
    union = set().union(*found)
    assert sum(map(len, found)) == len(union)
    assert union == brute_force(hashes, distance)


def test_a_bucket_of_one_cluster_is_searched_whole() -> None:
    generator = np.random.default_rng(3)
    hashes = np.unique(flipped(np.full(700, 0x0123456789ABCDEF, np.uint64), 5, generator))
    assert as_set(matches(hashes, 6)) == brute_force(hashes, 6)


def test_shuffling_bits_keeps_distances_and_loses_nothing() -> None:
    hashes = np.random.default_rng(4).integers(0, 2**64, 2000, dtype=np.uint64)
    hashes[:64] = np.uint64(1) << np.arange(64, dtype=np.uint64)
    shuffled = shuffled_bits(hashes)
    assert len(np.unique(shuffled[:64])) == 64
    assert (popcount(shuffled[1:] ^ shuffled[:-1]) == popcount(hashes[1:] ^ hashes[:-1])).all()


def test_more_hashes_make_narrower_buckets() -> None:
    assert choose_scheme(6, 10**9).num_equal > choose_scheme(6, 10**6).num_equal >= 2
    assert choose_scheme(6, 10**9, 10**4).num_equal < choose_scheme(6, 10**9).num_equal


def test_two_hundred_thousand_hashes_need_no_quadratic_work(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    hashes = telling_hashes(200_000, generator)
    hashes[-100:] = flipped(hashes[:100], 4, generator)
    compared = []

    def counting(values: np.ndarray) -> np.ndarray:
        compared.append(len(values))
        return popcount(values)

    monkeypatch.setattr(image, "popcount", counting)
    later, earlier, _ = matches(hashes, 6)
    assert set(zip(range(199_900, 200_000), range(100), strict=True)) <= set(zip(later.tolist(), earlier.tolist(), strict=True))
    assert sum(compared) < 200_000**2 / 2 / 100


def pictures_without_detail() -> dict[str, np.ndarray]:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    half = np.random.default_rng(6).integers(0, 256, (256, 128), dtype=np.uint8)
    card = np.zeros((256, 256), np.uint8)
    card[80:176, 60:196] = 255
    blurred_jpeg = cv2.imencode(".jpg", np.full((256, 256), 77, np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 50])[1]
    return {
        "black": np.zeros((256, 256), np.uint8),
        "white": np.full((256, 256), 255, np.uint8),
        "gray as JPEG": cv2.imdecode(blurred_jpeg, cv2.IMREAD_GRAYSCALE),
        "gradient": ramp,
        "gradient down": np.ascontiguousarray(ramp.T),
        "mirrored noise": np.concatenate([half, half[:, ::-1]], axis=1),
        "card": card,
    }


def test_hashes_of_pictures_without_detail_tell_nothing() -> None:
    telling = {name: bool(is_telling(np.array([phash(pixels)], np.uint64))[0]) for name, pixels in pictures_without_detail().items()}
    assert telling == dict.fromkeys(telling, False)


def test_hashes_of_noise_and_text_tell_pictures_apart() -> None:
    page = np.full((256, 256), 255, np.uint8)
    cv2.putText(page, "image not found", (20, 130), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0,))
    noise = np.random.default_rng(7).integers(0, 256, (256, 256), dtype=np.uint8)
    assert is_telling(np.array([phash(page), phash(noise)], np.uint64)).all()
