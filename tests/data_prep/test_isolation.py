"""A function that kills its process costs one call."""

import os
import signal

import pytest

from data_prep.isolation import Isolated
from data_prep.reasons import Drop


def work(data: bytes) -> int:
    if data == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"drop":
        raise Drop("truncated", "early")
    return len(data)


def test_results_and_verdicts_come_through_and_a_death_is_a_verdict() -> None:
    with Isolated(work) as isolated:
        assert isolated(b"abc") == 3
        with pytest.raises(Drop, match="truncated"):
            isolated(b"drop")
        with pytest.raises(Drop) as caught:
            isolated(b"die")
        assert caught.value.reason == "corrupt"
        assert isolated(b"after") == 5
