"""Where half-precision values are widened before elementwise math, and where nothing else decides on a dtype."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in fp32 if it is of half precision; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """Within it products have the dtype of their factors, also where the caller uses `torch.autocast`, which would round fp32 ones to bf16."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()
