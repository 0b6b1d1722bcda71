"""Normal forms, the accuracy of the estimated similarity, and what the bands find."""

import hashlib

import numpy as np
import pytest

from data_prep.dedup.caption import (
    NUM_PERMUTATIONS,
    SHINGLE,
    agreement,
    choose_bands,
    minima_of,
    normalize,
    similarity,
    sketches_of,
    text_hashes,
)
from tests.data_prep.dedup.quality import close_captions, make_captions


def shingles(text: str) -> set[str]:
    text = text.ljust(SHINGLE)
    return {text[start : start + SHINGLE] for start in range(len(text) - SHINGLE + 1)}


def jaccard(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def minima(texts: list[str]) -> np.ndarray:
    return np.concatenate(list(minima_of(texts)), axis=1)


def edited_pairs(count: int) -> tuple[list[str], list[str]]:
    """Captions, and the same with one to five words exchanged."""
    generator = np.random.default_rng(0)
    originals, others = make_captions(count, generator), make_captions(count, generator)
    edited = []
    for number, (text, other) in enumerate(zip(originals, others, strict=True)):
        words, strange = text.split(), other.split()
        for place in range(min(1 + number % 5, len(words), len(strange))):
            words[place] = strange[place]
        edited.append(" ".join(words))
    return originals, edited


@pytest.mark.parametrize(
    ("caption", "normal"),
    [
        ("  A Red   Car. ", "a red car"),
        ("A red-car!", "a red car"),
        ("ＡＢＣ ﬁsh", "abc fish"),
        ("STRASSE Straße", "strasse strasse"),
        ("हिन्दी में", "हिन्दी में"),
        ("cat 😀", "cat"),
        ("😀 😀", "😀 😀"),
        ("!!", "!!"),
        ("♥\ufe0f", "♥\ufe0f"),
        ("", ""),
        ("photo\x00 7", "photo 7"),
    ],
)
def test_normal_form(caption: str, normal: str) -> None:
    assert normalize([caption]) == [normal]


def test_equal_normal_forms_have_equal_hashes_and_sketches() -> None:
    texts = normalize(["A red car.", "a RED, car", "a red bar"])
    hashes, sketches = text_hashes(texts), sketches_of(minima(texts))
    assert hashes[0] == hashes[1] != hashes[2]
    assert agreement(sketches[:1], sketches[1:2]).tolist() == [NUM_PERMUTATIONS]
    assert agreement(sketches[:1], sketches[2:]).tolist() != [NUM_PERMUTATIONS]


def test_sketches_depend_on_the_text_alone() -> None:
    """Neither on the captions around it nor on the release of a library: they decide what is dropped."""
    texts = ["", "a", "tiny", "日本語の説明", "a red car on a bridge", "a red bus on a bridge", "long " * 3000]
    together = sketches_of(minima(texts))
    alone = np.concatenate([sketches_of(minima([text])) for text in texts])
    assert (together == alone).all()
    assert hashlib.sha256(together.tobytes()).hexdigest()[:16] == "3f0eadd0547ffd23"


def test_estimated_similarity_is_as_accurate_as_theory_allows() -> None:
    originals, edited = edited_pairs(4000)
    true = np.array([jaccard(*pair) for pair in zip(originals, edited, strict=True)])
    one, other = minima(originals), minima(edited)
    error = similarity(agreement(sketches_of(one), sketches_of(other))) - true
    by_minima = (one == other).mean(axis=0) - true
    expected = np.sqrt((true * (1 - true)).mean() / NUM_PERMUTATIONS)
    assert abs(by_minima.mean()) < 0.005
    assert abs(error.mean()) < 0.005
    assert by_minima.std() < 1.1 * expected
    assert error.std() < 1.2 * expected


def test_estimate_is_no_worse_than_that_of_datasketch() -> None:
    datasketch = pytest.importorskip("datasketch")
    originals, edited = edited_pairs(400)
    true = np.array([jaccard(*pair) for pair in zip(originals, edited, strict=True)])

    def sketch(text: str) -> object:
        built = datasketch.MinHash(NUM_PERMUTATIONS)
        built.update_batch([shingle.encode() for shingle in sorted(shingles(text))])
        return built

    theirs = np.array([sketch(one).jaccard(sketch(other)) for one, other in zip(originals, edited, strict=True)]) - true
    ours = similarity(agreement(sketches_of(minima(originals)), sketches_of(minima(edited)))) - true
    assert np.sqrt((ours**2).mean()) < 1.25 * np.sqrt((theirs**2).mean())


@pytest.mark.parametrize("wanted", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_nearly_all_captions_above_the_similarity_and_none_below(wanted: float) -> None:
    originals, edited = edited_pairs(1500)
    bands = choose_bands(wanted)
    assert bands.num_bands * bands.num_rows <= NUM_PERMUTATIONS
    agreed = agreement(sketches_of(minima(originals)), sketches_of(minima(edited))) >= bands.min_agreement
    found = close_captions(originals + edited, bands)
    recalled = [(number + 1500, number) in found for number in np.flatnonzero(agreed).tolist()]
    assert np.mean(recalled or [True]) > 0.97
    assert all(agreed[later - 1500] for later, earlier in found if later - earlier == 1500)
    if wanted < 1:
        assert len(recalled) > 20


def test_a_threshold_of_one_takes_only_equal_sets_of_shingles() -> None:
    assert close_captions(["abab abab", "abab abab abab", "abab abac"], choose_bands(1.0)) == {(1, 0)}
