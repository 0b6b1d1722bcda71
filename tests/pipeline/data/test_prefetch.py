"""The reader thread hands everything on in order, errors included, and never leaves anyone waiting."""

import threading
import time

import pytest

from pipeline.data.prefetch import Prefetcher


def _threads() -> int:
    return sum(thread.name == "jetway-reader" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_items_come_in_order_from_the_start_given(depth):
    prefetcher = Prefetcher(lambda number: number * number, start=3, depth=depth)
    assert [prefetcher.get() for _ in range(20)] == [number * number for number in range(3, 23)]
    prefetcher.close()


def test_no_more_than_depth_items_are_prepared_ahead():
    made: list[int] = []
    prefetcher = Prefetcher(lambda number: made.append(number) or number, start=0, depth=3)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(made) == 4, "three in the queue, one in the thread's hand"
    prefetcher.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_reaches_the_consumer_after_the_good_items_and_stays(depth):
    def produce(number: int) -> int:
        if number == 5:
            raise OSError("the disk is gone")
        return number

    prefetcher = Prefetcher(produce, start=3, depth=depth)
    assert [prefetcher.get(), prefetcher.get()] == [3, 4]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            prefetcher.get()
    prefetcher.close()


def test_close_ends_a_thread_that_waits_for_room_and_may_be_repeated():
    before = _threads()
    prefetcher = Prefetcher(lambda number: number, start=0, depth=1)
    prefetcher.get()
    prefetcher.close()
    prefetcher.close()
    assert _threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.get()


def test_close_frees_a_waiting_consumer():
    release = threading.Event()
    prefetcher = Prefetcher(lambda number: release.wait(30), start=0, depth=1)
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            prefetcher.get()
        except RuntimeError as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    consumer.join(timeout=10)
    assert not consumer.is_alive()
    assert len(errors) == 1
    release.set()
    closer.join(timeout=10)
    assert not closer.is_alive()
