"""Captions by length and language."""

import pytest

from configs.errors import UserError
from data_prep.config import FilterConfig
from data_prep.filters.text import check_caption, check_languages, language_of
from data_prep.reasons import Drop


def reason(caption: str, **settings: object) -> str:
    """Why a caption is dropped; empty if it is kept."""
    try:
        check_caption(caption, FilterConfig(**settings))  # type: ignore[arg-type]
    except Drop as drop:
        return drop.reason
    return ""


@pytest.mark.parametrize(
    ("caption", "settings", "expected"),
    [
        ("abc", {"min_caption_chars": 3}, ""),
        ("ab", {"min_caption_chars": 3}, "caption_too_short"),
        ("東京の", {"min_caption_chars": 3}, ""),
        ("two words", {"min_caption_words": 2}, ""),
        ("one", {"min_caption_words": 2}, "caption_too_short"),
        ("two words", {"max_caption_words": 2}, ""),
        ("three words here", {"max_caption_words": 2}, "caption_too_long"),
        ("", {"max_caption_words": 0}, ""),
        ("", {"min_caption_words": 1}, "caption_too_short"),
        ("", {}, ""),
    ],
)
def test_bounds_are_inclusive(caption: str, settings: dict[str, object], expected: str) -> None:
    assert reason(caption, **settings) == expected


class TestLanguage:
    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("py3langid")

    def test_keeps_the_languages_asked_for(self) -> None:
        english, german = "A red bicycle leans against the wall of an old house", "Ein rotes Fahrrad lehnt an der Wand eines alten Hauses"
        assert reason(english, languages=("en",)) == ""
        assert reason(german, languages=("en",)) == "language"
        assert reason(german, languages=("en", "de")) == ""

    def test_a_verdict_that_is_not_certain_enough_drops(self) -> None:
        caption = "A red bicycle leans against the wall of an old house"
        language, probability = language_of(caption)
        assert language == "en"
        assert reason(caption, languages=("en",), min_language_probability=probability) == ""
        assert reason(caption, languages=("en",), min_language_probability=probability + 1e-6) == "language"
        assert reason("xq 17", min_language_probability=0.999) == "language"

    def test_same_text_same_verdict(self) -> None:
        assert len({language_of("Café am Fluss") for _ in range(5)}) == 1

    def test_unknown_codes_are_refused_before_the_run(self) -> None:
        check_languages(FilterConfig(languages=("en", "ja")))
        with pytest.raises(UserError, match="not known") as caught:
            check_languages(FilterConfig(languages=("en", "english")))
        assert "english" in str(caught.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from data_prep.filters import text

    text._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match="pip install"):
        check_languages(FilterConfig(languages=("en",)))
