"""What failed, whether it can heal, and how long to wait before trying again."""

import hashlib
import math
from datetime import timezone
from email.utils import parsedate_to_datetime

HEALING = frozenset({"connection", "dns", "http_429", "timeout", "wrong_length"})
"""The reasons, beside `http_5..`, after which another attempt may succeed."""

_DETAIL_CHARS = 200


class Failed(Exception):  # noqa: N818 - a verdict about one address, not an error of the program
    """An attempt gave no image.

    Attributes:
        reason: a key of `data_prep.reasons.REASONS`, or `http_` and a status.
        detail: one line for people.
        status: HTTP status of the response, 0 if there was none.
        retry_after_s: how long the server asks to be left alone; None if it does not say.
        is_final: it will not heal although its reason may.
        is_unreachable: nothing listens there, which says something about the whole host and not only this address.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        status: int = 0,
        retry_after_s: float | None = None,
        is_final: bool = False,
        is_unreachable: bool = False,
    ) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(detail[: 4 * _DETAIL_CHARS].split())[:_DETAIL_CHARS]
        self.status = status
        self.retry_after_s = retry_after_s
        self.is_final = is_final
        self.is_unreachable = is_unreachable

    @property
    def can_heal(self) -> bool:
        """Whether another attempt makes sense."""
        return not self.is_final and (self.reason in HEALING or self.reason.startswith("http_5"))


def backoff(url: str, attempt: int, first_s: float) -> float:
    """Seconds before attempt `attempt` (from 1): `first_s` doubling each time, times 0.5 to 1.5.

    The jitter is a hash of the address, so that a rerun waits equally long and two addresses do not wait in step.
    """
    digest = hashlib.blake2b(f"{attempt} {url}".encode("utf-8", "replace"), digest_size=4).digest()
    return first_s * 2.0 ** (attempt - 1) * (0.5 + int.from_bytes(digest, "big") / 2**32)


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds from `now` (Unix time) that a Retry-After header asks for, in either of its forms; None if it says nothing."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text) if len(text) < 12 else math.inf
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # "-0000": UTC, says RFC 5322
            date = date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - now)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
