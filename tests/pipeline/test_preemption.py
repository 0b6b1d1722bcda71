"""A stop signal is remembered, not acted on."""

import os
import signal

import pytest
import torch

from pipeline.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_is_remembered_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed(torch.device("cpu"))
        os.kill(os.getpid(), number)
        assert stop.received == number.name
        assert stop.agreed(torch.device("cpu"))
    assert signal.getsignal(number) == before


def test_second_signal_does_not_disturb_unless_it_is_ctrl_c() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
