"""Scores from a function of the user's own (CLIP, safety, aesthetics), on Ray actors that the tasks of a run share.

`filters.scorer=module:Class` names a class with

    def score(self, images: list[numpy.ndarray], captions: list[str]) -> dict[str, Sequence[float]]

`images` are the stored pictures, uint8 [height, width] or [height, width, 3]; every list returned holds one number per image. The class is
built once per actor, so that a model is loaded once. The scores go into the sample's JSON under `scores`, and `filters.scores` bounds them.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from configs.errors import UserError
from data_prep.config import FilterConfig
from data_prep.images.encode import decode_stored

BATCH = 64
"""Images in one call."""

MAX_CALLS = 4
"""Calls that one task has under way: enough to keep an actor busy, few enough to bound memory."""


class Scorer:
    """The actor's side: decodes, calls the user's class, and checks what it returns."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._scorer = load_scorer(path)()

    def score(self, images: Sequence[bytes], captions: Sequence[str]) -> dict[str, list[float]]:
        """Scores of a batch: name -> one number per image.

        Raises:
            UserError: the user's class returned something else.
        """
        found = self._scorer.score([decode_stored(image) for image in images], list(captions))
        if not isinstance(found, Mapping) or any(len(values) != len(images) for values in found.values()):
            expected = f"a dict of name -> {len(images)} numbers"
            raise UserError(f"filters.scorer={self._path} returned something else than scores", got=repr(found)[:200], expected=expected)
        return {str(name): [float(value) for value in values] for name, values in found.items()}


def load_scorer(path: str) -> Any:
    """The class that `module:Class` names.

    Raises:
        UserError: there is none, or it has no `score`.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        fix = "install the module, or put its folder on PYTHONPATH"
        raise UserError(f"filters.scorer={path} cannot be imported", got=error, expected="module:Class", fix=fix) from None
    if not callable(getattr(found, "score", None)):
        raise UserError(f"filters.scorer={path} has no method `score`", expected="score(images, captions) -> dict of lists")
    return found


@contextmanager
def scorers(config: FilterConfig) -> Iterator[tuple[Any, ...]]:
    """Handles of the scoring actors for one run; none without `filters.scorer`. They end with the block.

    Raises:
        UserError: the class cannot be imported or built.
    """
    if config.scorer is None:
        yield ()
        return
    load_scorer(config.scorer)  # here first: a misspelt name is an error of the driver, not of an actor
    import ray

    # num_cpus=0: the actors must not take the CPUs that the tasks wait for.
    actor = ray.remote(num_cpus=0, num_gpus=config.scorer_gpus, max_restarts=3, max_task_retries=3)(Scorer)
    handles = tuple(actor.remote(config.scorer) for _ in range(config.scorer_actors))
    try:
        yield handles
    finally:
        for handle in handles:
            ray.kill(handle)


class ScoreQueue:
    """A task's side: collects samples into batches, keeps a few calls under way, and hands the scores back in order."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self._numbers: list[int] = []
        self._images: list[bytes] = []
        self._captions: list[str] = []
        self._calls: list[tuple[list[int], Any]] = []
        self._num_calls = 0

    def put(self, number: int, image: bytes, caption: str) -> Iterator[tuple[int, dict[str, float]]]:
        """Takes a sample; yields (number, scores) of samples that are through by now."""
        self._numbers.append(number)
        self._images.append(image)
        self._captions.append(caption)
        if len(self._numbers) == BATCH:
            self._send(number)
        while len(self._calls) > MAX_CALLS:
            yield from self._receive()

    def finish(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yields (number, scores) of all that are left."""
        if self._numbers:
            self._send(self._numbers[-1])
        while self._calls:
            yield from self._receive()

    def _send(self, number: int) -> None:
        actor = self._actors[(number + self._num_calls) % len(self._actors)]
        self._calls.append((self._numbers, actor.score.remote(self._images, self._captions)))
        self._num_calls += 1
        self._numbers, self._images, self._captions = [], [], []

    def _receive(self) -> Iterator[tuple[int, dict[str, float]]]:
        import ray

        numbers, call = self._calls.pop(0)
        try:
            scores = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise UserError(
                "filters.scorer failed", got=f"{type(error.cause).__name__}: {error.cause}", fix="mend the class, then run again"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise UserError("an actor of filters.scorer died", got=str(error).splitlines()[0], fix="see that its model fits the memory") from None
        for row, number in enumerate(numbers):
            yield number, {name: values[row] for name, values in scores.items()}
