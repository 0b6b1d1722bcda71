"""The optimiser is the reference's, in torch terms."""

import torch
from torch import nn

from model.jetformer import build_jetformer
from pipeline.config import OptimizerConfig
from pipeline.optim import WeightAverage, build_optimizer
from tests.distributed.worker import scenario_config


def test_every_parameter_is_in_one_group_and_only_kernels_decay() -> None:
    model = build_jetformer(scenario_config("base").model)
    optimizer = build_optimizer(model, OptimizerConfig(), torch.device("cpu"))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names.values()) == sorted(names[parameter] for group in (decayed, plain) for parameter in group["params"])
    assert "embed.text.weight" in {names[parameter] for parameter in plain["params"]}
    assert {"blocks.0.attn.q.weight", "head.text.weight"} <= {names[parameter] for parameter in decayed["params"]}
    assert not any(name.endswith("bias") or "norm" in name or "posemb" in name for name in (names[p] for p in decayed["params"]))


def test_updates_follow_the_reference_chain() -> None:
    """optax: clip -> adam -> * lr -> + wd * p -> * schedule -> negate, with lr 1e-3 and wd 1e-4 (spec 1.9)."""
    head = nn.Module()
    head.text = nn.Linear(3, 2)
    module = nn.Module()
    module.head = head
    torch.nn.init.constant_(head.text.weight, 0.5)
    optimizer = build_optimizer(module, OptimizerConfig(), torch.device("cpu"))
    weight = head.text.weight.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(0)
    for step, schedule in enumerate([0.0, 0.5, 1.0], start=1):
        gradient = torch.randn(2, 3, generator=generator)
        head.text.weight.grad, head.text.bias.grad = gradient.clone(), torch.zeros(2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.95 * second + 0.05 * gradient.double() ** 2
        adam = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        weight -= schedule * (1e-3 * adam + 1e-4 * weight)
        torch.testing.assert_close(head.text.weight.double(), weight, rtol=1e-6, atol=1e-7)


def test_weight_average_is_the_exponential_one() -> None:
    weight = torch.tensor([1.0, 2.0])
    average = WeightAverage([weight], decay=0.75)
    weight += 4.0
    average.update()
    torch.testing.assert_close(average.values[0], torch.tensor([2.0, 3.0]))
    average.restart()
    torch.testing.assert_close(average.values[0], weight)
