"""AdamW in two groups, weight decay on and off (spec 1.9), and the moving average of its fp32 masters."""

import torch
from torch import Tensor, nn

from model import init
from pipeline.config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW over the parameters of `module`, whose names are global ones.

    torch multiplies weight decay by the learning rate, so the reference's 1e-4 at learning rate 1e-3 is 0.1 here.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (decayed if init.decays(name) else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )


class WeightAverage:
    """Exponential moving average of the fp32 masters that this rank owns: ema <- decay * ema + (1 - decay) * weight."""

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.decay = decay
        self._masters = masters
        self.values = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self) -> None:
        """After each optimiser step."""
        torch._foreach_lerp_(self.values, [master.detach() for master in self._masters], 1.0 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Starts again from the present weights."""
        torch._foreach_copy_(self.values, [master.detach() for master in self._masters])
