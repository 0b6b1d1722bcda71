"""AdamW in two groups, weight decay on and off (spec 1.9), whoever computes it; and the moving average of its fp32 masters.

| kernels.optimizer | computes | where it keeps the number of updates |
|---|---|---|
| torch | torch.optim.AdamW(fused=True), CPU and CUDA | a tensor in each parameter's state |
| apex | apex.optimizers.FusedAdam, CUDA | an integer in each group |
| deepspeed | deepspeed.ops.adam.FusedAdam, CUDA | an integer in each parameter's state |

All three keep fp32 `exp_avg` and `exp_avg_sq` per parameter, so that a run saved under one continues under another.
`auto` takes torch's for a group of 2^31 elements or more, as ZeRO may make one tensor of it: apex counted them in 32 bits until August 2024
(NVIDIA/apex #1825), DeepSpeed until late 2025, leaving weights as they were (deepspeedai/DeepSpeed #7640). The groups themselves stay two: with more
of them, a run on two pipeline stages hung in DeepSpeed (LOG.md, 2026-11-22).
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from model import init
from model.kernels.dispatch import choose
from pipeline.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTED_IN_32_BITS = 2**31
"""Elements of a tensor that some fused kernels cannot update."""


def build_optimizer(module: nn.Module, config: OptimizerConfig, device: torch.device, implementation: str = "auto") -> torch.optim.Optimizer:
    """AdamW over the parameters of `module`, whose names are global ones.

    All implementations multiply weight decay by the learning rate, so the reference's 1e-4 at learning rate 1e-3 is 0.1 here.

    Args:
        device: where the masters are.
        implementation: `kernels.optimizer`.

    Raises:
        UserError: the implementation cannot run there.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (decayed if init.decays(name) else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    largest = max((sum(parameter.numel() for parameter in group["params"]) for group in groups), default=0)
    if implementation == "auto" and largest >= COUNTED_IN_32_BITS:
        implementation = "torch"
    chosen = choose("optimizer", implementation, device, torch.float32)
    if chosen == "torch":
        return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"), **options)
    # Not imported above: both are optional, and DeepSpeed reads DS_ACCELERATOR at its first import.
    fused = importlib.import_module({"apex": "apex.optimizers", "deepspeed": "deepspeed.ops.adam"}[chosen])
    optimizer: torch.optim.Optimizer = fused.FusedAdam(groups, adam_w_mode=True, **options)
    return optimizer


def create_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """What AdamW makes at its first step, made now: a checkpoint can be written before, and loaded without, a step."""
    supplier = _supplier(optimizer)
    for group in optimizer.param_groups:
        if supplier == "apex":
            group.setdefault("step", 0)
        for master in group["params"]:
            state = optimizer.state[master]
            if state:
                continue
            if supplier != "apex":
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device) if supplier == "torch" else 0
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master, memory_format=torch.preserve_format)


def get_adam_step(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far."""
    if not optimizer.param_groups:
        return 0
    group = optimizer.param_groups[0]
    return int((group if _supplier(optimizer) == "apex" else optimizer.state[group["params"][0]])["step"])


def set_adam_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Makes the next update number `step` + 1; bias correction depends on it."""
    for group in optimizer.param_groups:
        holders = [group] if _supplier(optimizer) == "apex" else [optimizer.state[master] for master in group["params"]]
        for holder in holders:
            if isinstance(holder.get("step"), Tensor):
                holder["step"].fill_(step)
            else:
                holder["step"] = step


def _supplier(optimizer: torch.optim.Optimizer) -> str:
    """The package that an optimiser comes from."""
    return type(optimizer).__module__.partition(".")[0]


class WeightAverage:
    """Exponential moving average of the fp32 masters that this rank owns: ema <- decay * ema + (1 - decay) * weight.

    Each by itself: they are few and large, and the multi-tensor kernels of torch before 2.9 count elements in 32 bits.
    """

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.decay = decay
        self._masters = masters
        self.values = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self) -> None:
        """After each optimiser step."""
        for value, master in zip(self.values, self._masters, strict=True):
            value.lerp_(master.detach(), 1.0 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Starts again from the present weights."""
        for value, master in zip(self.values, self._masters, strict=True):
            value.copy_(master.detach())
