"""The learning rate as a pure function of the step, so that resuming cannot change it. Imports no torch.

(The RGB noise is one too: model.patchify.noise_sigma, applied by the loader.)
"""

import math

from pipeline.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of update number `step` (0-based; spec 1.9).

    `cosine`: lr * min(1, t/W) * (1 + cos(pi * clip((t-W) / (T-W), 0, 1))) / 2 with W = warmup_fraction * T, so that the first
    update has learning rate 0. `wsd`: the same warm-up, constant, then linear to 0 over the last `decay_fraction` of the run.
    `constant`: the warm-up, then constant.
    """
    warmup_steps = config.warmup_fraction * total_steps
    warmup = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    if config.schedule == "cosine":
        progress = _clip((step - warmup_steps) / max(total_steps - warmup_steps, 1e-12))
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "wsd":
        decay_steps = config.decay_fraction * total_steps
        shape = _clip((total_steps - step) / decay_steps) if decay_steps > 0 else 1.0
    else:
        shape = 1.0
    return config.learning_rate * warmup * shape


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
