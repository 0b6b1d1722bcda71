"""Which implementation computes each fused operation. Imports no torch, so that a login node can validate a run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsConfig:
    """`auto` takes the best that this device, dtype and installation offer; `jetway doctor` says which and why.

    Any other value forces one implementation, and fails with a reason where it cannot run. `reference` is plain torch.
    """

    gmm_nll: Literal["auto", "triton", "torch", "reference"] = "auto"
    """The image head and its likelihood. `torch`: the chunked one-pass algorithm without Triton."""
    linear_cross_entropy: Literal["auto", "torch", "reference"] = "auto"
    """The text head and its likelihood. `torch`: chunked, one pass."""
    affine_coupling: Literal["auto", "triton", "reference"] = "auto"
    """Permutation, affine map and log-determinant of the flow."""
    rms_norm: Literal["auto", "triton", "apex", "reference"] = "auto"
    """RMSNorm, with the residual addition and dropout before it."""
    layer_norm: Literal["auto", "triton", "reference"] = "auto"
    """LayerNorm of the flow's ViT blocks, with the residual addition before it."""
    rope: Literal["auto", "triton", "reference"] = "auto"
    geglu: Literal["auto", "triton", "liger", "reference"] = "auto"
    mixture_sample: Literal["auto", "triton", "reference"] = "auto"
    """One draw from the image head."""
    optimizer: Literal["auto", "apex", "deepspeed", "torch"] = "auto"
    """Whose AdamW makes the update; the update is the same to rounding."""
    gradient_accumulation_fusion: Literal["auto", "on", "off"] = "auto"
    """Weight gradients of Megatron-core's linears added to the fp32 accumulator inside the matrix product (needs apex)."""
    compile: Literal["off", "layers"] = "off"
    """`layers`: torch.compile of each coupling's network and (without tensor parallelism) each decoder block, inside which elementwise parts are
    plain torch for it to fuse."""
    tf32: bool = True
    """fp32 matrix products on CUDA use TF32 (10 bits of mantissa, fp32 sums), as exact as the reference on its TPUs (spec 1.3)."""
    workspace_mib: int = 1024
    """Memory for the outputs of one chunk of a head, in MiB; larger chunks mean fewer passes over its weight gradient."""

    def __post_init__(self) -> None:
        if self.workspace_mib < 1:
            raise ValueError(f"kernels.workspace_mib={self.workspace_mib} must be at least 1")
