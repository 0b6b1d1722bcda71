"""What the image head's loss takes at the published size, counted on the meta device: every allocation of the real path, no arithmetic."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels.gmm_nll import one_pass
from model.kernels.gmm_nll.interface import linear_gmm_nll, linear_gmm_nll_loss
from tests.model.kernels.live_memory import LiveBytes

pytest.importorskip("triton")

WIDTH, MIXTURES, SOFT_DIM = 1536, 1024, 128
GIB = 2**30


class NoKernel:
    """Stands where a Triton kernel is launched."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


@pytest.fixture
def no_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches do nothing, and products allocate what cuBLAS's do: their results."""
    from model.kernels.gmm_nll import interface, triton_kernels
    from model.kernels.gmm_nll.triton_passes import TritonPasses

    monkeypatch.setattr(triton_kernels, "gmm_log_joint_kernel", NoKernel())
    monkeypatch.setattr(triton_kernels, "gmm_gradient_kernel", NoKernel())
    monkeypatch.setattr(one_pass, "widened_product", lambda left, right: left.new_empty(len(left), right.shape[1], dtype=torch.float32))
    monkeypatch.setattr(one_pass, "add_product", lambda total, left, right, **options: None)
    monkeypatch.setattr(interface, "choose", lambda *arguments: "triton")
    monkeypatch.setattr(interface, "_passes", lambda impl: TritonPasses())


def make_inputs(num_tokens: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    options = {"dtype": torch.bfloat16, "device": "meta"}
    shapes = [(MIXTURES, WIDTH), (MIXTURES,), (MIXTURES, 2, SOFT_DIM, WIDTH), (MIXTURES, 2, SOFT_DIM)]
    hidden = torch.empty(num_tokens, WIDTH, **options).requires_grad_()  # type: ignore[call-overload]
    soft = torch.empty(num_tokens, SOFT_DIM, device="meta").requires_grad_()
    return hidden, soft, tuple(torch.empty(shape, **options).requires_grad_() for shape in shapes)  # type: ignore[call-overload]


def workspace_of(num_tokens: int, *, one_pass_loss: bool) -> float:
    """Peak bytes of forward and backward above inputs, outputs and gradients, in GiB."""
    hidden, soft, weights = make_inputs(num_tokens)
    token_weight = torch.empty(num_tokens, device="meta")
    with LiveBytes() as live:
        if one_pass_loss:
            outputs = linear_gmm_nll_loss(hidden, soft, weights, token_weight)  # type: ignore[arg-type]
            loss = outputs[0]
        else:
            outputs = (linear_gmm_nll(hidden, soft, weights),)  # type: ignore[arg-type]
            loss = outputs[0].sum()
        loss.backward()
    kept = [*outputs, *(leaf.grad for leaf in (hidden, soft, *weights) if leaf.grad is not None)]
    assert len(kept) == len(outputs) + 6
    return (live.peak - sum(tensor.untyped_storage().nbytes() for tensor in kept)) / GIB


@pytest.mark.usefixtures("no_arithmetic")
@pytest.mark.parametrize("one_pass_loss", [True, False], ids=["loss", "per token"])
def test_workspace_is_below_two_gib_and_does_not_grow(one_pass_loss: bool) -> None:
    at = {num_tokens: workspace_of(num_tokens, one_pass_loss=one_pass_loss) for num_tokens in (2048, 8192, 32768)}
    assert at[8192] <= 2.0, at
    # Beyond one chunk only a few numbers per token are added: the outputs of the head alone would be 12 GiB more.
    assert at[32768] - at[8192] < 0.2, at
    # The count sees what is there: one chunk of outputs and the fp32 sum of the weight gradient, which is twice the gradient.
    assert at[8192] >= (2048 * 2 * MIXTURES * SOFT_DIM * 2 + MIXTURES * 2 * SOFT_DIM * WIDTH * 2) / GIB, at


def test_the_count_sees_what_eager_keeps() -> None:
    """The reference on 256 tokens, one image: several fp32 tensors of [256, 1024, 128], 0.125 GiB each."""
    hidden, soft, weights = make_inputs(256)
    with LiveBytes() as live:
        linear_gmm_nll(hidden, soft, weights, impl="reference").sum().backward()  # type: ignore[arg-type]
    gradients = sum(leaf.grad.untyped_storage().nbytes() for leaf in (hidden, soft, *weights) if leaf.grad is not None)
    assert live.peak - gradients > 0.4 * GIB  # per image (specification 1.14)
