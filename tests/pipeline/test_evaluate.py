"""`jetway eval` takes its arguments in any order; what it scores is what training trains."""

import dataclasses

import torch

from pipeline.evaluate import _parser, in_order, trained_orders
from tests.distributed.worker import scenario_config, synthetic_batch


def test_overrides_may_stand_on_either_side_of_an_option() -> None:
    for words in (["run", "a=1", "--ema"], ["run", "--ema", "a=1"], ["--ema", "run", "a=1"]):
        arguments = _parser().parse_intermixed_args(words)
        assert (arguments.source, arguments.overrides, arguments.ema) == ("run", ["a=1"], True)


def test_orders_that_never_occur_in_training_are_not_scored() -> None:
    config = scenario_config("base")

    def with_share(share: float) -> tuple[bool, ...]:
        objective = dataclasses.replace(config.model.objective, text_first_probability=share)
        return trained_orders(dataclasses.replace(config, model=dataclasses.replace(config.model, objective=objective)))

    assert with_share(0.5) == (True, False)
    assert with_share(1.0) == (True,)
    assert with_share(0.0) == (False,)


def test_batch_in_one_order_keeps_its_examples_and_drops_nothing() -> None:
    batch = synthetic_batch(scenario_config("base"), 0, 0, 8)
    for text_first in (True, False):
        turned = in_order(batch, text_first=text_first)
        assert torch.equal(turned.positions, batch.positions)
        assert turned.num_text_first == (8 if text_first else 0)
        assert turned.text_first.tolist() == [text_first] * 8
        assert turned.score_all
        assert not turned.drop_prefix.any()
