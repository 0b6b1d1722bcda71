"""One process of the head test: `python -m tests.distributed.heads_worker OUT_DIR RANK SIZE`.

Holds its share of the mixtures and of the vocabulary, and saves what it computed: values and gradients of its own rows, and of the shared inputs.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.gmm_nll.interface import linear_gmm_nll, linear_gmm_nll_loss
from model.kernels.linear_cross_entropy.interface import linear_cross_entropy, linear_cross_entropy_loss
from model.parallel import TensorParallel
from tests.model.kernels import test_gmm_nll, test_linear_cross_entropy

MIXTURES, PIECES = (9, 6, 7, 4), (9, 6, 11)
"""(N, D, K, d) and (N, D, V): shares are uneven."""
CHUNK_BYTES = 7 * 8 * 4 * 3 * 4
"""Several chunks of tokens."""


def compute(group: object, tp: TensorParallel, impl: str, *, one_pass: bool) -> dict[str, Tensor]:
    """Everything in fp64, so that ranks and one process differ by rounding alone."""
    device = torch.device("cpu")
    gmm = test_gmm_nll.make_inputs(MIXTURES, dtype=torch.float64, device=device)
    start, stop = tp.bounds(MIXTURES[2])
    gmm = {name: (value if name in ("hidden", "soft") else value[start:stop]).detach().requires_grad_() for name, value in gmm.items()}
    weight = test_gmm_nll.token_weights(MIXTURES[0], device).double()
    options = {"group": group, "impl": impl, "workspace_bytes": CHUNK_BYTES, "num_mixtures": MIXTURES[2]}
    if one_pass:
        loss, nll = linear_gmm_nll_loss(gmm["hidden"], gmm["soft"], test_gmm_nll.weights_of(gmm), weight, **options)  # type: ignore[arg-type]
    else:
        nll = linear_gmm_nll(gmm["hidden"], gmm["soft"], test_gmm_nll.weights_of(gmm), **options)  # type: ignore[arg-type]
        loss = (nll * weight).sum()
    results = {"gmm": nll.detach(), **{f"gmm.{name}": grad for name, grad in test_gmm_nll.gradients(loss, gmm).items()}}

    text, targets = test_linear_cross_entropy.make_inputs(PIECES, dtype=torch.float64)
    start, stop = tp.bounds(PIECES[2])
    text = {name: (value if name == "hidden" else value[start:stop]).detach().requires_grad_() for name, value in text.items()}
    text_options = {"group": group, "impl": impl, "workspace_bytes": CHUNK_BYTES, "first_row": start, "vocab_size": PIECES[2]}
    if one_pass:
        loss, nll = linear_cross_entropy_loss(*text.values(), targets, weight, **text_options)  # type: ignore[arg-type]
    else:
        nll = linear_cross_entropy(*text.values(), targets, **text_options)  # type: ignore[arg-type]
        loss = (nll * weight).sum()
    gradients = dict(zip(text, torch.autograd.grad(loss, list(text.values())), strict=True))
    return results | {"text": nll.detach(), **{f"text.{name}": grad for name, grad in gradients.items()}}


def main() -> None:
    """Joins the group, computes with every implementation, saves."""
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    tp = TensorParallel(size, rank, dist.group.WORLD)
    for impl in ("torch", "reference"):
        for one_pass in (True, False):
            torch.save(compute(tp.group, tp, impl, one_pass=one_pass), folder / f"{impl}-{one_pass}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
