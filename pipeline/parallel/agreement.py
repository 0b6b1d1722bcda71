"""Errors and values that all ranks share, so that no rank waits for one that has given up."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from configs.errors import UserError
from pipeline.checkpoint.ranks import Ranks
from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.parallel.environment import ProcessEnvironment
from pipeline.parallel.layout import Layout, setup_layout, teardown_layout

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


def open_dataset_together(layout: Layout, path: str, generation: int | None) -> Dataset:
    """The data set as rank 0 finds it, on every rank: same generation, same takedowns, whatever is published meanwhile. Collective.

    Raises:
        SharedUserError: it cannot be opened.
    """
    ranks = Ranks(layout.control_group)
    mine = together(layout, lambda: open_dataset(path, generation) if ranks.is_first else None)
    found = ranks.broadcast(None if mine is None else (mine.manifest.generation, mine.tombstones.number))
    return together(layout, lambda: mine or open_dataset(path, *(found or (generation, None))))


@contextlib.contextmanager
def joined(config: RunConfig, environment: ProcessEnvironment) -> Iterator[Layout]:
    """This rank's place among the processes, left again at an end that all ranks share: success or a SharedUserError.

    A process group left to the interpreter's exit sometimes aborts the process there. Another error leaves it as it is: the other
    ranks may be waiting in a collective.
    """
    layout = setup_layout(config, environment)
    try:
        yield layout
    except SharedUserError:
        teardown_layout(layout)
        raise
    teardown_layout(layout)
