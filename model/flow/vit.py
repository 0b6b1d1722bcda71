"""The small ViT inside a coupling (spec 1.3). Activations stay fp32; matrix products run in the dtype of the weights.

Letters: B images, I tokens, W flow width, H heads, K head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import FlowConfig
from model.kernels.config import KernelsConfig
from model.kernels.inductor import run_compiled, vary_batch
from model.kernels.layer_norm.interface import add_layer_norm
from model.kernels.precision import widen
from model.parallel import Dense


class LayerNorm(nn.Module):
    """Layer norm with learnable scale and bias, computed in fp32 whatever the dtype of its parameters, after the addition of a branch."""

    def __init__(self, width: int, *, impl: str) -> None:
        """
        Args:
            impl: `kernels.layer_norm`.
        """
        super().__init__()
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, branch: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """fp32 [B or 1, I, W], [B, I, W] -> (fp32 x + branch, its norm in `out_dtype`), [B, I, W] each."""
        return add_layer_norm(x, branch, self.weight, self.bias, out_dtype=out_dtype, impl=self.impl)


class Attention(nn.Module):
    """Bidirectional multi-head attention with biases everywhere."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Dense(config.width, 3 * config.width)
        self.out = Dense(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, W] -> [B, I, W]."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class VitBlock(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += W2 gelu_tanh(W1 norm(x)).

    The second sum is left to the norm that reads it, that of the next block: a sum and its norm are one pass over memory.
    """

    def __init__(self, config: FlowConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, impl=kernels.layer_norm)
        self.attention = Attention(config)
        self.norm2 = LayerNorm(config.width, impl=kernels.layer_norm)
        self.fc1 = Dense(config.width, config.mlp_dim)
        self.fc2 = Dense(config.mlp_dim, config.width)

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The input in two parts whose sum it is, fp32 [B or 1, I, W] and [B, I, W] -> the output likewise."""
        x, normed = self.norm1(x, branch, self.attention.qkv.weight.dtype)
        x, normed = self.norm2(x, self.attention(normed), self.fc1.weight.dtype)
        return x, self.fc2(functional.gelu(self.fc1(normed), approximate="tanh"))


class CouplingNetwork(nn.Module):
    """Conditioning half -> shifts and raw scales for the other half."""

    def __init__(self, config: FlowConfig, *, in_dim: int, num_tokens: int, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        kernels = kernels or KernelsConfig()
        self.compiles = kernels.compile == "layers"
        self.init_proj = Dense(in_dim, config.width)
        self.posemb = nn.Parameter(torch.empty(1, num_tokens, config.width))
        self.blocks = nn.ModuleList([VitBlock(config, kernels) for _ in range(config.block_depth)])
        self.norm = LayerNorm(config.width, impl=kernels.layer_norm)
        self.final_proj = Dense(config.width, 2 * in_dim)

    def forward(self, x: Tensor) -> Tensor:
        """fp32 [B, I, in_dim] -> [shifts | raw scales], fp32 [B, I, 2 in_dim]."""
        if not self.compiles:
            return network_forward(self, x)
        x = x.contiguous()  # as code is made per order of the strides, and halves of channels and of tokens differ in it
        vary_batch(x)
        return run_compiled(network_forward, x.device)(self, x)


def network_forward(network: CouplingNetwork, x: Tensor) -> Tensor:
    """Shifts and raw scales; a function of the module, so that all couplings share compiled code."""
    hidden, branch = widen(network.posemb), network.init_proj(x)
    for block in network.blocks:
        hidden, branch = block(hidden, branch)
    # The last product feeds the affine map directly, where bf16 would cost round-trip accuracy (spec 2: 2.5e-2 vs 1.1e-2).
    assert network.final_proj.bias is not None
    weight, bias = widen(network.final_proj.weight), widen(network.final_proj.bias)
    _, normed = network.norm(hidden, branch, weight.dtype)
    return functional.linear(normed, weight, bias)
