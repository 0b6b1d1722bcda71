"""The two heads as problems to be timed: a loss over N tokens whose linear layer has far more outputs than inputs.

Letters: N tokens, D width, K mixtures, d soft channels, V vocabulary, R outputs of the head per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.benchmarks.bench_checks import Results, compare_with_reference
from tests.benchmarks.bench_device import Device

Leaves = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class HeadProblem:
    """One head at one shape."""

    name: str
    shape: str
    leaves: Leaves
    """Differentiable inputs: `hidden` [N, D], other inputs of a token, and the weights."""
    constants: Leaves
    """Inputs per token without gradient."""
    per_token: tuple[str, ...]
    """Names of the inputs that have a row per token."""
    outputs: int
    """R."""
    loss: Callable[[str, Leaves], tuple[Tensor, Tensor]]
    """(implementation, inputs) -> (scalar loss, nll [N])."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.leaves["hidden"])

    @property
    def flops(self) -> float:
        """Of one product."""
        return 2.0 * self.num_tokens * self.leaves["hidden"].shape[1] * self.outputs

    @property
    def owned_bytes(self) -> int:
        """Outputs and gradients, which any implementation must leave behind."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves.values()) + 4 * (self.num_tokens + 1)

    def run(self, impl: str) -> Tensor:
        """Forward and backward: gradients are left at the leaves."""
        loss, nll = self.loss(impl, self.leaves | self.constants)
        loss.backward()
        return nll

    def forget_gradients(self) -> None:
        """So that the next pass allocates them again."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def step(self, impl: str) -> Callable[[], object]:
        """What is timed."""

        def action() -> None:
            self.forget_gradients()
            self.run(impl)

        return action

    def results(self, impl: str, dtype: torch.dtype | None = None, chunk: int | None = None) -> Results:
        """nll and every gradient, the floating-point inputs first turned into `dtype`.

        Args:
            chunk: tokens at a time; gradients of the weights are then added up in fp32 or better. For the reference, which would not fit.
        """
        leaves = {name: _as(leaf, dtype, name).detach().requires_grad_() for name, leaf in self.leaves.items()}
        chunk = chunk or self.num_tokens
        nlls, sums = [], {name: torch.zeros_like(leaf, dtype=_sum_dtype(leaf)) for name, leaf in leaves.items()}
        for start in range(0, self.num_tokens, chunk):
            part = slice(start, start + chunk)
            inputs = {name: (value[part] if name in self.per_token else value) for name, value in (leaves | self.constants).items()}
            loss, nll = self.loss(impl, inputs)
            loss.backward()
            nlls.append(nll.detach())
            for name, leaf in leaves.items():
                if name not in self.per_token and leaf.grad is not None:
                    sums[name] += leaf.grad
                    leaf.grad = None
        found = {"nll": torch.cat(nlls)}
        for name, leaf in leaves.items():
            found[f"gradient of {name}"] = leaf.grad if name in self.per_token and leaf.grad is not None else sums[name].to(leaf.dtype)
        return found

    def check(self, impl: str) -> str:
        """Compares an implementation with the reference at this very shape; the reference runs in chunks of tokens.

        Raises:
            AssertionError: it is less exact than eager torch in the same dtype.
        """
        chunk = max(1, min(self.num_tokens, 2**27 // self.outputs))
        wide = torch.float32 if self.leaves["hidden"].dtype == torch.bfloat16 else torch.float64
        return compare_with_reference(
            self.results(impl),
            lambda: self.results("reference", chunk=chunk),
            lambda: self.results("reference", wide, chunk=chunk),
            dtype=self.leaves["hidden"].dtype,
        )

    def products(self) -> dict[str, Callable[[], object]]:
        """The three matrix products that no implementation can do without, on buffers that exist: forward, gradient of hidden, of the weights."""
        hidden = self.leaves["hidden"].detach()
        generator = torch.Generator(hidden.device).manual_seed(1)
        outputs = hidden.new_empty(self.num_tokens, self.outputs).normal_(generator=generator)
        weight = hidden.new_empty(self.outputs, hidden.shape[1]).normal_(generator=generator)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
        return {
            "forward product": lambda: torch.mm(hidden, weight.t(), out=outputs),
            "product for hidden": lambda: torch.mm(outputs, weight, out=grad_hidden),
            "product for weights": lambda: torch.mm(outputs.t(), hidden, out=grad_weight),
        }


def gmm_problem(device: Device, *, tokens: int, width: int, mixtures: int, soft_dim: int, workspace_bytes: int) -> HeadProblem:
    """The image head; means and scales as of a model in training: some units apart."""
    from model.kernels.gmm_nll.interface import linear_gmm_nll_loss

    draw = _drawer(device)
    leaves = {
        "hidden": draw(tokens, width),
        "soft": draw(tokens, soft_dim, dtype=torch.float32),
        "logit_weight": draw(mixtures, width, std=width**-0.5),
        "logit_bias": draw(mixtures),
        "component_weight": draw(mixtures, 2, soft_dim, width, std=0.3 * width**-0.5),
        "component_bias": draw(mixtures, 2, soft_dim, std=0.3),
    }
    constants = {"token_weight": _token_weight(device, tokens)}

    def loss(impl: str, x: Leaves) -> tuple[Tensor, Tensor]:
        weights = x["logit_weight"], x["logit_bias"], x["component_weight"], x["component_bias"]
        return linear_gmm_nll_loss(x["hidden"], x["soft"], weights, x["token_weight"], impl=impl, workspace_bytes=workspace_bytes)

    shape = f"N={tokens}, D={width}, K={mixtures}, d={soft_dim}, {_name(device.dtype)}, workspace {workspace_bytes / 2**20:g} MiB"
    return HeadProblem("linear_gmm_nll_loss", shape, leaves, constants, ("hidden", "soft", "token_weight"), mixtures * (1 + 2 * soft_dim), loss)


def text_problem(device: Device, *, tokens: int, width: int, vocab: int, workspace_bytes: int) -> HeadProblem:
    """The text head."""
    from model.kernels.linear_cross_entropy.interface import linear_cross_entropy_loss

    draw = _drawer(device)
    leaves = {"hidden": draw(tokens, width), "weight": draw(vocab, width, std=width**-0.5), "bias": draw(vocab)}
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(2)).to(device.device)
    constants = {"targets": targets, "token_weight": _token_weight(device, tokens)}

    def loss(impl: str, x: Leaves) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy_loss(
            x["hidden"], x["weight"], x["bias"], x["targets"], x["token_weight"], impl=impl, workspace_bytes=workspace_bytes
        )

    shape = f"N={tokens}, D={width}, V={vocab}, {_name(device.dtype)}, workspace {workspace_bytes / 2**20:g} MiB"
    return HeadProblem("linear_cross_entropy_loss", shape, leaves, constants, ("hidden", "targets", "token_weight"), vocab, loss)


def _drawer(device: Device) -> Callable[..., Tensor]:
    generator = torch.Generator(device.device).manual_seed(0)

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        # Drawn in the final dtype: the weights of the image head would be 1.6 GB more in fp32.
        values = torch.empty(shape, device=device.device, dtype=dtype or device.dtype).normal_(0.0, std, generator=generator)
        return values.requires_grad_()

    return draw


def _token_weight(device: Device, tokens: int) -> Tensor:
    """As of training: of about one over N each, and some tokens not scored."""
    weight = torch.full((tokens,), 1.0 / tokens, device=device.device)
    weight[::17] = 0.0
    return weight


def _as(leaf: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None or (name == "soft" and dtype == torch.float32):
        return leaf.detach()
    return leaf.detach().to(dtype)


def _sum_dtype(leaf: Tensor) -> torch.dtype:
    return torch.float32 if leaf.dtype == torch.bfloat16 else leaf.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float32", "fp32")
