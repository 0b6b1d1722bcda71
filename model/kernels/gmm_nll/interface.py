"""The mixture head's likelihood with bounded memory: token chunks, each recomputed in the backward pass.

At K=1024, d=128 the head emits 263,168 numbers per token (spec 1.14); kept for the backward pass they are 0.4 GB per image.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.kernels.gmm_nll.reference import HeadWeights, linear_gmm_logsumexp_reference, positive_scale

MAX_CHUNK_BYTES = 256 * 2**20
"""fp32 head outputs held at once; several intermediates of this size live together."""


def linear_gmm_logsumexp(hidden: Tensor, soft: Tensor, weights: HeadWeights, *, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> tuple[Tensor, Tensor]:
    """logsumexp_k(logit_k + log N_k(soft)) and logsumexp_k(logit_k).

    Args:
        hidden: [N, D]; soft: fp32 [N, d]; weights: see `HeadWeights`.
        max_chunk_bytes: tokens are processed in chunks whose head outputs fit this; one chunk is not recomputed.

    Returns:
        fp32 [N] twice; differentiable in hidden, soft and all weights.
    """
    num_tokens, bytes_per_token = len(hidden), 4 * weights[2][:, :, :, 0].numel()
    chunk = max(1, max_chunk_bytes // bytes_per_token)
    if num_tokens <= chunk:
        return linear_gmm_logsumexp_reference(hidden, soft, weights)
    parts = [
        checkpoint(linear_gmm_logsumexp_reference, hidden[i : i + chunk], soft[i : i + chunk], weights, use_reentrant=False, preserve_rng_state=False)
        for i in range(0, num_tokens, chunk)
    ]
    joint, logits = zip(*parts, strict=True)
    return torch.cat(joint), torch.cat(logits)


__all__ = ["linear_gmm_logsumexp", "positive_scale"]
