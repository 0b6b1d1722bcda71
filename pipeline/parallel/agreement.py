"""Errors and values that all ranks share, so that no rank waits for one that has given up."""

from collections.abc import Callable
from typing import TypeVar

from configs.errors import UserError
from pipeline.checkpoint.ranks import Ranks
from pipeline.parallel.layout import Layout

T = TypeVar("T")


class SharedUserError(UserError):
    """A user's mistake that every rank raises together: one of them shows it, and all may end in good order."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


def together(layout: Layout, action: Callable[[], T]) -> T:
    """Runs `action` on every rank; where it raises UserError on any, all ranks raise its message. Collective.

    Raises:
        SharedUserError: the first rank's message. Other exceptions pass unchanged, on the rank that raised them.
    """
    result, message = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    messages = [text for text in Ranks(layout.control_group).all_gather(message) if text is not None]
    if messages:
        raise SharedUserError(messages[0])
    return result  # type: ignore[return-value]  # it ran without an error
