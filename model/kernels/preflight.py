"""Whether a run's `kernels.*` can be had where it runs: asked once at its start, not when an operation first comes up.

A step, or the first images drawn, may be hours away, and of many processes only some may get there.
"""

import torch

from model.kernels.config import KernelsConfig
from model.kernels.dispatch import ALWAYS_FP32, OPERATIONS, choose
from model.kernels.inductor import require_compiler


def check_kernels(config: KernelsConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Nothing, if every implementation that the configuration forces can run.

    Args:
        dtype: of the run's parameters.

    Raises:
        UserError: one cannot; it names the option and the reason.
    """
    for operation in OPERATIONS:
        requested = getattr(config, operation)
        if requested != "auto":
            choose(operation, requested, device, torch.float32 if operation in ALWAYS_FP32 else dtype)
    if config.compile == "layers":
        require_compiler(device.type)
