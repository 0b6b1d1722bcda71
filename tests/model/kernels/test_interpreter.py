"""The interpreter that stands in for a GPU rounds as one does (tests/model/conftest.py)."""

import pytest
import torch

from model.kernels.dispatch import is_interpreting


@pytest.mark.skipif(not is_interpreting(), reason="Triton is not interpreting")
def test_bf16_rounds_to_the_nearest_even() -> None:
    from tests.model.kernels.round_trip import to_bf16_and_back

    x = torch.cat(
        [torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-5, 5).repeat(100), torch.tensor([1e-40, 3e38])]
    )
    x = torch.cat([x, (x.view(torch.int32) & ~0x1FFFF | 0x8000).view(torch.float32), torch.tensor([0.0, -0.0, float("inf"), float("nan")])])
    narrow, wide = to_bf16_and_back(x)
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
