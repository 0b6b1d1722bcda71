"""A training step in two forms: through the engine, and as a plain loop with the same arithmetic (bf16 weights, fp32 sums and masters).

The plain loop can pass its weights on to a model built with other kernels, so that an ablation builds one set of weights and one optimiser.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model import init
from model.batch import Batch
from model.config import DecoderConfig, FlowConfig, GmmConfig, ImageConfig, JetFormerConfig, ObjectiveConfig, TextConfig
from model.kernels.config import KernelsConfig
from model.layers import layer_specs
from pipeline.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig
from pipeline.parallel.stage import PipelineStage
from tests.benchmarks.bench_device import Device
from tests.benchmarks.bench_section import Context, Section
from tests.model.kernels import checks

OBJECTIVE = ObjectiveConfig(order="alternate")
"""Half of every micro-batch is text-first: the same expectation as the published draw, and the same work in every step."""
REFERENCE = replace(checks.REFERENCE, optimizer="torch", gradient_accumulation_fusion="off", tf32=False)
"""Plain torch throughout."""


def published(size: str) -> JetFormerConfig:
    """The image-text models of `configs/train`, without the loader, which a bare machine may lack the libraries for."""
    if size == "350m":
        return JetFormerConfig(objective=OBJECTIVE)
    assert size == "1p3b", size
    return JetFormerConfig(
        flow=FlowConfig(block_depth=6), decoder=DecoderConfig(width=1536, depth=48, mlp_dim=6144, head_dim=96), objective=OBJECTIVE
    )


def miniature() -> JetFormerConfig:
    """Every part of the published ones, for a CPU."""
    return JetFormerConfig(
        image=ImageConfig(resolution=16, patch_size=4),
        text=TextConfig(length=8, num_pieces=64),
        flow=FlowConfig(depth=2, block_depth=1, width=32, num_heads=2),
        decoder=DecoderConfig(width=48, depth=2, mlp_dim=96, num_heads=2, head_dim=24),
        gmm=GmmConfig(num_mixtures=16, soft_dim=8),
        objective=OBJECTIVE,
    )


def run_config(context: Context, model: JetFormerConfig, *, micro_batches: int, kernels: KernelsConfig | None = None) -> RunConfig:
    """One process, the precision of training on the device, recomputation on."""
    return RunConfig(
        model=model,
        device="cuda" if context.device.is_cuda else "cpu",
        data=DataConfig(global_batch_size=2 * micro_batches, micro_batch_size=2),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        parallel=ParallelConfig(precision="bf16" if context.device.dtype == torch.bfloat16 else "fp32", recompute="full"),
        kernels=kernels or KernelsConfig(),
    )


@torch.no_grad()
def fill(named_parameters: Iterable[tuple[str, nn.Parameter]], *_: object) -> None:
    """Start values of the right size for all weights, tiles of one random block: drawing each by its name takes a minute for 1p3b.

    Unlike at a real start no weight is zero: products of zeros draw less power and so run faster.
    """
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    blocks: dict[torch.device, Tensor] = {}
    for name, parameter in named_parameters:
        if parameter.dim() < 2 or "posemb" in name:
            parameter.fill_(1.0 if re.search(r"dnn.*norm\d?\.weight", name) else 0.0)
            continue
        source = blocks.setdefault(parameter.device, block.to(parameter.device))
        scale = 1.0 if name.startswith("embed.text") else parameter.shape[-1] ** -0.5 * (0.02 if "final_proj" in name else 1.0)
        flat, size = parameter.view(-1), len(source)
        whole = len(flat) // size * size
        flat[:whole].view(-1, size).copy_(source * scale)
        flat[whole:].copy_(source[: len(flat) - whole] * scale)


class Step(Protocol):
    """An optimiser step."""

    name: str
    stage: PipelineStage

    def run(self, batches: Sequence[Batch]) -> float | Tensor:
        """One step; returns the gradient norm before clipping."""
        ...

    def recover(self) -> None:
        """After a step that did not fit."""
        ...


@dataclass(slots=True)
class Weights:
    """What a plain loop trains, with its optimiser; shared by models of different kernels."""

    parameters: list[nn.Parameter]
    masters: list[Tensor]
    sums: list[Tensor]
    optimizer: torch.optim.AdamW

    @staticmethod
    def of(module: nn.Module, config: RunConfig) -> "Weights":
        """fp32 masters, fp32 gradient sums filled as gradients arrive, fused AdamW."""
        decayed = [init.decays(name) for name, _ in module.named_parameters()]
        parameters = list(module.parameters())
        masters = [parameter.detach().float().clone() for parameter in parameters]
        sums = [torch.zeros_like(master) for master in masters]
        for parameter, total in zip(parameters, sums, strict=True):

            def add(parameter: Tensor, total: Tensor = total) -> None:
                assert parameter.grad is not None
                total.add_(parameter.grad)
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(add)
        settings = config.optimizer
        groups = [
            {"params": [m for m, d in zip(masters, decayed, strict=True) if d is wanted], "weight_decay": settings.weight_decay * wanted}
            for wanted in (True, False)
        ]
        betas = (settings.beta1, settings.beta2)
        return Weights(parameters, masters, sums, torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True))

    @torch.no_grad()
    def update(self, max_norm: float) -> Tensor:
        """Clips, updates the masters, copies them into the weights."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.sums)))
        torch._foreach_mul_(self.sums, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        for master, total in zip(self.masters, self.sums, strict=True):
            master.grad = total
        self.optimizer.step()
        torch._foreach_copy_([*self.parameters], self.masters)
        torch._foreach_zero_(self.sums)
        return norm


class PlainStep:
    """The layers of a one-stage pipeline and AdamW, without an engine."""

    def __init__(self, config: RunConfig, device: Device, like: "PlainStep | None" = None) -> None:
        """
        Args:
            like: whose weights and optimiser to use.
        """
        self.config, self.name = config, f"plain PyTorch loop: {config.parallel.precision} weights, fp32 gradient sums and masters, fused AdamW"
        specs = layer_specs(config.model, None, config.kernels)
        self.stage = PipelineStage(specs, config=config.model, previous=None, is_last=True, recompute=config.parallel.recompute)
        if like is None:
            self.stage.to(device.device)
            fill(self.stage.named_parameters())
            for parameter in self.stage.parameters():
                parameter.data = parameter.data.to(device.dtype)
            self.weights = Weights.of(self.stage, config)
        else:
            self.stage.load_state_dict(like.stage.state_dict(keep_vars=True), assign=True)
            self.stage.to(device.device)
            self.weights = like.weights
            assert all(a is b for a, b in zip(self.stage.parameters(), self.weights.parameters, strict=True))
        self._edge = torch.zeros(1, device=device.device)

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """One step; returns the gradient norm before clipping."""
        self.losses(batches)
        return self.weights.update(self.config.optimizer.gradient_clipping)

    def losses(self, batches: Sequence[Batch]) -> Tensor:
        """Forward and backward: the mean loss; gradients are added to the sums."""
        if self._edge.is_cuda:
            torch.set_float32_matmul_precision("high" if self.config.kernels.tf32 else "highest")
        self.stage.feed.load(batches)
        self.stage.terms.clear()
        total = torch.zeros((), device=self._edge.device)
        for _ in batches:
            loss = self.stage(self._edge) / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def gradient_norm(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """(loss, gradient norm) without an update: what two implementations must agree on."""
        with torch.enable_grad():
            loss = self.losses(batches)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.weights.sums)))
        torch._foreach_zero_(self.weights.sums)
        return float(loss), float(norm)

    def recover(self) -> None:
        """Forgets a step that did not fit."""
        self.stage.feed.clear()
        for parameter in self.weights.parameters:
            parameter.grad = None
        torch._foreach_zero_(self.weights.sums)


class EngineStep:
    """The engine that trains."""

    def __init__(self, config: RunConfig) -> None:
        from pipeline.engine import Engine
        from pipeline.parallel.layout import setup_layout

        init.initialise = fill  # type: ignore[assignment]
        self.name = "engine: DeepSpeed, ZeRO-1"
        self.engine = Engine(config, setup_layout(config))
        self.stage = self.engine.stage

    def run(self, batches: Sequence[Batch]) -> float | Tensor:
        """One step; returns the gradient norm before clipping."""
        # At a learning rate of 0 the update costs the same, and every step is measured on the same weights.
        return self.engine.train_step(batches, 0.0).grad_norm

    def recover(self) -> None:
        """Drops what DeepSpeed keeps of a step that did not fit, and the gradients of its micro-batches: fp32 sums, and what waits for them."""
        self.stage.feed.clear()
        deepspeed: Any = self.engine._deepspeed
        for buffers in deepspeed.pipe_buffers.values():
            buffers[:] = [None] * len(buffers)
        deepspeed.loss = deepspeed.total_loss = None
        for parameter in self.stage.parameters():
            parameter.grad = None
        if (sums := deepspeed.module.gradient_sums) is not None:
            sums.forget()
        with suppress(AttributeError):  # with fp32 weights there are none
            deepspeed.optimizer.clear_hp_grads()


def build_step(config: RunConfig, device: Device, section: Section) -> Step:
    """Through the engine if DeepSpeed is installed; if it then fails, the section says so and goes on without."""
    if importlib.util.find_spec("deepspeed"):
        try:
            return EngineStep(config)
        except Exception as error:
            section.fail(error)
        device.release()
    return PlainStep(config, device)


def largest_micro_batch(fits: Callable[[int], bool], *, start: int, most: int, may_go_on: Callable[[], bool]) -> int:
    """Largest size that fits, by doubling and then halving the gap down to an eighth; 0 if `start` does not fit and nothing below.

    Args:
        may_go_on: False ends the search with the best so far.
    """
    best, failed = 0, math.inf
    size = start
    while size <= most and may_go_on():
        if not fits(size):
            failed = size
            break
        best, size = size, size * 2
    if not best:
        while (size := size // 2) and may_go_on():
            if fits(size):
                best = size
                break
            failed = size
    while failed < math.inf and failed - best > max(1, best // 8) and may_go_on():
        middle = (best + int(failed)) // 2
        if fits(middle):
            best = middle
        else:
            failed = middle
    return best


def without_recomputation(config: RunConfig) -> RunConfig:
    """The same run, keeping all activations."""
    return replace(config, parallel=replace(config.parallel, recompute="none"))
