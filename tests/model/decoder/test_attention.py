"""Attention with fewer key-value heads than query heads, on the kernels that read them as they are."""

import pytest
import torch

from model.config import DecoderConfig
from model.decoder.attention import Attention
from model.parallel import TensorParallel


@pytest.mark.gpu
@pytest.mark.parametrize("length", [70, 321])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_flash_attention_on_grouped_heads_equals_repeated_heads(head_dim: int, num_kv_heads: int, length: int) -> None:
    config = DecoderConfig(width=64, depth=1, mlp_dim=64, num_heads=4, num_kv_heads=num_kv_heads, head_dim=head_dim)
    attention = Attention(config, TensorParallel.single())
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, length, head_dim), *[(3, num_kv_heads, length, head_dim)] * 2]
    q, k, v = (torch.randn(shape, generator=generator).to("cuda", torch.bfloat16).requires_grad_() for shape in shapes)
    grouped = attention._attend(q, k, v, None)
    everywhere = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    repeated = attention._attend(q, k, v, everywhere)  # a mask takes the other way
    torch.testing.assert_close(grouped, repeated, rtol=2e-2, atol=2e-2)
    probe = torch.randn(grouped.shape, generator=generator).to("cuda", torch.bfloat16)
    for found, expected in zip(torch.autograd.grad(grouped, (q, k, v), probe), torch.autograd.grad(repeated, (q, k, v), probe), strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
