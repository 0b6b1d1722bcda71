"""Filters on captions: length and language."""

import functools
from typing import Any

from configs.errors import UserError
from data_prep.config import FilterConfig
from data_prep.reasons import Drop


def check_caption(caption: str, filters: FilterConfig) -> None:
    """Judges a caption. Words are what white space separates, so a sentence of Chinese or Japanese is one.

    Raises:
        Drop: caption_too_short, caption_too_long or language.
        UserError: a language is asked for and cannot be told.
    """
    if len(caption) < filters.min_caption_chars:
        raise Drop("caption_too_short", f"{len(caption)} characters")
    if filters.min_caption_words or filters.max_caption_words is not None:
        words = len(caption.split())
        if words < filters.min_caption_words:
            raise Drop("caption_too_short", f"{words} words")
        if filters.max_caption_words is not None and words > filters.max_caption_words:
            raise Drop("caption_too_long", f"{words} words")
    if filters.languages or filters.min_language_probability > 0:
        language, probability = language_of(caption)
        if (filters.languages and language not in filters.languages) or probability < filters.min_language_probability:
            raise Drop("language", f"{language} {probability:.2f}")


def language_of(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability 0-1) of the likeliest language. Short captions are told with little certainty.

    Raises:
        UserError: the package that tells languages is not installed.
    """
    code, probability = _identifier().classify(text)
    return str(code), float(probability)


def check_languages(filters: FilterConfig) -> None:
    """Refuses settings that could only fail, or drop everything, in the middle of a run.

    Raises:
        UserError: a code that is not known, or the package is not installed.
    """
    if not filters.languages:
        if filters.min_language_probability > 0:
            _identifier()
        return
    known = sorted(set(_identifier().labels))
    for code in filters.languages:
        if code not in known:
            raise UserError("filters.languages holds a language that is not known", got=code, expected=f"some of {' '.join(known)}")


@functools.cache
def _identifier() -> Any:
    """The classifier; loading takes a third of a second, a caption 0.1 ms. Its verdict depends on the text alone."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    except (ImportError, AttributeError) as error:
        raise UserError("filters.languages needs py3langid", got=error, expected="version 0.4 or newer", fix='pip install "py3langid>=0.4"') from None
