"""Where half-precision values are widened before elementwise math."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in fp32 if it is of half precision; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
