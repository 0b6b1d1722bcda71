"""The optimiser is the reference's, in torch terms, whoever computes it; a run goes on under another one."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from model.jetformer import build_jetformer
from model.kernels import dispatch
from pipeline import optim
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.writer import save
from pipeline.config import OptimizerConfig
from pipeline.engine import Engine
from pipeline.optim import MOMENTS, WeightAverage, build_optimizer, create_adam_state, get_adam_step, set_adam_step
from pipeline.parallel.layout import Layout, setup_layout, teardown_layout
from tests.distributed.worker import Record, run_steps, scenario_config

SUPPLIERS = ("torch", "apex", "deepspeed")
LR = 1e-3


def multi_tensor_adam(chunk: int, overflow: Tensor, lists: list[list[Tensor]], *numbers: Any) -> None:
    """The CUDA kernel that apex and DeepSpeed share, in torch: same arguments, same arithmetic."""
    lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay = numbers
    assert type(step) is int  # a C++ int
    assert mode == bias_correction == 1
    for gradient, weight, first, second in zip(*lists, strict=True):
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps) + weight_decay * weight
        weight.data.sub_(lr * update)


class FusedAdam(torch.optim.Optimizer):
    """apex.optimizers.FusedAdam as Python sees it: `step` is kept in the group, and states are made where there are none."""

    __module__ = "apex.optimizers.fused_adam"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            lists: list[list[Tensor]] = [[], [], [], []]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                for one, tensor in zip(lists, (weight.grad, weight, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                    one.append(tensor)
            numbers = (
                group["lr"],
                *group["betas"],
                group["eps"],
                group["step"],
                self.adam_w_mode,
                int(group["bias_correction"]),
                group["weight_decay"],
            )
            multi_tensor_adam(0, torch.zeros(1), lists, *numbers)


@pytest.fixture
def any_supplier(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes `auto` mean one supplier, on a CPU: a stand-in for apex, and DeepSpeed's own Python around the kernel above."""
    apex = ModuleType("apex.optimizers")
    apex.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    import deepspeed.ops.adam.fused_adam as fused_adam

    extension = SimpleNamespace(multi_tensor_adam=multi_tensor_adam)
    monkeypatch.setattr(fused_adam, "FusedAdamBuilder", lambda: SimpleNamespace(load=lambda: extension))
    monkeypatch.setattr(fused_adam, "get_accelerator", lambda: SimpleNamespace(IntTensor=torch.IntTensor))
    return lambda supplier: monkeypatch.setattr(optim, "choose", lambda *arguments: supplier)


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


def small_module(device: str = "cpu") -> nn.Module:
    """One weight that decays and one bias that does not."""
    module = nn.Module()
    module.head = nn.Module()
    module.head.text = nn.Linear(3, 2)
    nn.init.constant_(module.head.text.weight, 0.5)
    nn.init.constant_(module.head.text.bias, -0.25)
    return module.to(device)


def updates(module: nn.Module, optimizer: torch.optim.Optimizer, schedule: list[float], first_step: int = 0) -> None:
    """One update for each value of the schedule."""
    for step, share in enumerate(schedule, start=first_step):
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        for group in optimizer.param_groups:
            group["lr"] = LR * share
        optimizer.step()


def in_fp64(module: nn.Module, schedule: list[float]) -> list[Tensor]:
    """optax: adam -> * lr -> + wd * p -> * schedule -> negate, with lr 1e-3 and wd 1e-4 on the weight alone (spec 1.9)."""
    weights = [parameter.detach().double().cpu().clone() for parameter in module.parameters()]
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    for step, share in enumerate(schedule):
        generator = torch.Generator().manual_seed(step)
        for i, decay in enumerate((1e-4, 0.0)):
            gradient = torch.randn(weights[i].shape, generator=generator).double()
            first, second = moments[i]
            moments[i] = first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
            adam = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            weights[i] = weights[i] - share * (1e-3 * adam + decay * weights[i])
    return weights


SCHEDULE = [0.0, 0.5, 1.0, 0.75, 0.25]


@pytest.mark.parametrize("supplier", SUPPLIERS)
@pytest.mark.parametrize("prepared", [False, True])
def test_updates_follow_the_reference_chain(any_supplier: Callable[[str], None], supplier: str, prepared: bool) -> None:
    """`prepared`: with the state made beforehand, as in a run, or at the first step."""
    any_supplier(supplier)
    module = small_module()
    truth = in_fp64(module, SCHEDULE)
    optimizer = build_optimizer(module, OptimizerConfig(), torch.device("cpu"))
    assert type(optimizer).__module__.startswith(supplier)
    if prepared:
        create_adam_state(optimizer)
        assert get_adam_step(optimizer) == 0
    updates(module, optimizer, SCHEDULE)
    assert get_adam_step(optimizer) == len(SCHEDULE)
    for found, expected in zip(module.parameters(), truth, strict=True):
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("before", SUPPLIERS)
@pytest.mark.parametrize("after", SUPPLIERS)
def test_moments_and_step_carry_over(any_supplier: Callable[[str], None], before: str, after: str) -> None:
    module = small_module()
    truth = in_fp64(module, SCHEDULE)
    any_supplier(before)
    first = build_optimizer(module, OptimizerConfig(), torch.device("cpu"))
    create_adam_state(first)
    updates(module, first, SCHEDULE[:2])
    any_supplier(after)
    second = build_optimizer(module, OptimizerConfig(), torch.device("cpu"))
    create_adam_state(second)
    for parameter in module.parameters():
        for moment in MOMENTS:
            second.state[parameter][moment].copy_(first.state[parameter][moment])
    set_adam_step(second, get_adam_step(first))
    updates(module, second, SCHEDULE[2:], first_step=2)
    assert get_adam_step(second) == len(SCHEDULE)
    for found, expected in zip(module.parameters(), truth, strict=True):
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def alone() -> Iterator[Layout]:
    """A world of this process."""
    layout = setup_layout(scenario_config("base"))
    yield layout
    teardown_layout(layout)


@pytest.mark.parametrize(("before", "after", "scenario"), [("torch", "apex", "bf16"), ("apex", "torch", "base"), ("apex", "deepspeed", "bf16")])
def test_run_saved_under_one_resumes_under_another(
    any_supplier: Callable[[str], None], alone: Layout, tmp_path: Path, before: str, after: str, scenario: str
) -> None:
    config = scenario_config(scenario)

    def engine(supplier: str) -> Engine:
        any_supplier(supplier)
        return Engine(config, alone)

    reference, whole = Record(), engine("torch")
    run_steps(whole, range(4), reference)
    record, first = Record(), engine(before)
    run_steps(first, range(2), record, {2: tmp_path / "saved"})
    second = engine(after)
    with open_checkpoint(tmp_path / "saved") as reader:
        assert reader.state["adam_step"] == 2
        second.zero.load(reader, adam_step=reader.state["adam_step"])
    run_steps(second, range(2, 4), record)
    assert (whole.zero.adam_step, second.zero.adam_step) == (4, 4)
    assert record.losses == pytest.approx(reference.losses, rel=1e-5)
    assert record.norms == pytest.approx(reference.norms, rel=1e-4 if scenario == "base" else 1e-2)
    save(tmp_path / "final", 4, second.zero.fragments(), {"adam_step": second.zero.adam_step})
    expected = {fragment.name: fragment.tensor for fragment in whole.zero.fragments()}
    for fragment in second.zero.fragments():
        if fragment.name.startswith(("param/", "ema/")):
            torch.testing.assert_close(fragment.tensor, expected[fragment.name], rtol=1e-4, atol=1e-5, msg=fragment.name)


@pytest.mark.parametrize(("requested", "limit", "expected"), [("auto", 7, "apex"), ("auto", 6, "torch"), ("apex", 6, "apex")])
def test_large_groups_go_to_a_kernel_that_counts_in_64_bits(
    any_supplier: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, requested: str, limit: int, expected: str
) -> None:
    any_supplier("apex")
    monkeypatch.setattr(optim, "choose", lambda operation, implementation, *where: "apex" if implementation == "auto" else implementation)
    monkeypatch.setattr(optim, "COUNTED_IN_32_BITS", limit)  # the larger group of the module has 6
    optimizer = build_optimizer(small_module(), OptimizerConfig(), torch.device("cpu"), requested)
    assert type(optimizer).__module__.startswith(expected)


def test_forced_optimizer_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="kernels.optimizer=apex cannot run here"):
        build_optimizer(small_module(), OptimizerConfig(), torch.device("cpu"), "apex")
    with pytest.raises(UserError, match="kernels.optimizer=deepspeed cannot run here"):
        build_optimizer(small_module(), OptimizerConfig(), torch.device("cpu"), "deepspeed")


@pytest.mark.gpu
@pytest.mark.parametrize("supplier", SUPPLIERS)
def test_real_ones_agree_with_the_reference_chain(supplier: str) -> None:
    device = torch.device("cuda")
    where = dispatch.Where("cuda", torch.float32, forced=True)
    obstacle = next(one.obstacle(where) for one in dispatch.OPERATIONS["optimizer"] if one.name == supplier)
    if obstacle:
        pytest.skip(obstacle)
    module = small_module("cuda")
    truth = in_fp64(module, SCHEDULE)
    optimizer = build_optimizer(module, OptimizerConfig(), device, supplier)
    create_adam_state(optimizer)
    updates(module, optimizer, SCHEDULE)
    assert get_adam_step(optimizer) == len(SCHEDULE)
    for found, expected in zip(module.parameters(), truth, strict=True):
        torch.testing.assert_close(found.detach().double().cpu(), expected, rtol=1e-5, atol=1e-6)


def test_weight_average_is_the_exponential_one() -> None:
    weight = torch.tensor([1.0, 2.0])
    average = WeightAverage([weight], decay=0.75)
    weight += 4.0
    average.update()
    torch.testing.assert_close(average.values[0], torch.tensor([2.0, 3.0]))
    average.restart()
    torch.testing.assert_close(average.values[0], weight)
