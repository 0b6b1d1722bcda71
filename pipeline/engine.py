"""The one engine: tensor-parallel layers inside DeepSpeed's PipelineEngine with ZeRO-1, for one process and for thousands."""

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from model import init
from model.batch import Batch
from model.kernels.dispatch import choose
from model.kernels.preflight import check_kernels
from model.layers import LayerSpec, layer_specs
from pipeline.config import RunConfig
from pipeline.optim import build_optimizer
from pipeline.parallel.layout import Layout, assert_same_grid, check_layout
from pipeline.parallel.partition import cut_layers, stage_costs
from pipeline.parallel.stage import PipelineStage
from pipeline.parallel.zero_fragments import ZeroState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step reports without a device synchronisation of its own."""

    grad_norm: float | Tensor
    """Global gradient norm before clipping, over all ranks; the same on all of them."""
    is_finite: bool
    """False: some gradient was not finite; then no weight has changed, on any rank."""


class Engine:
    """One rank's stage, its optimiser and the engine that runs them."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        """Builds the stage with initial weights from (config.seed, global name), and DeepSpeed around it."""
        self.config, self.layout = config, layout
        self.micro_batch_size, self.num_micro_batches = check_layout(config, layout.world_size)
        self.specs = layer_specs(config.model, layout.tensor_parallel, config.kernels)
        self.bounds = cut_layers([spec.training_flops for spec in self.specs], layout.pipe)
        self.stage = build_stage(config, layout, self.specs, self.bounds)
        self.stage.num_micro_batches = self.num_micro_batches
        init.initialise(self.stage.named_parameters(), config.model, config.seed)
        self._deepspeed = _start_deepspeed(self.stage, self.specs, self.bounds, config, layout, self._deepspeed_config())
        self.zero = ZeroState(self.stage, self._deepspeed.optimizer, layout, config.optimizer.ema_decay)
        self._groups: list[dict[str, Any]] = self._deepspeed.optimizer.optimizer.param_groups
        dummy = torch.zeros(1, device=layout.device)
        # DeepSpeed pulls (input, label) of the first and last stage from here; the real data is in the stage's feed.
        self._placeholders: Iterator[tuple[Tensor, Tensor]] = itertools.repeat((dummy, dummy))

    def train_step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Forward, backward, clip and AdamW update over this rank's micro-batches of one step.

        Args:
            batches: `num_micro_batches` of them, on the device; the same on all ranks of a pipeline.
            learning_rate: of this update.
        """
        assert len(batches) == self.num_micro_batches, (len(batches), self.num_micro_batches)
        for group in self._groups:
            group["lr"] = learning_rate
        self.stage.feed.load(batches)
        self.stage.terms.clear()
        self._deepspeed.train_batch(data_iter=self._placeholders)
        optimizer = self._deepspeed.optimizer
        is_finite = not optimizer.overflow
        if is_finite and self.zero.average is not None:
            self.zero.average.update()
        return StepResult(grad_norm=optimizer._global_grad_norm, is_finite=is_finite)

    def take_stats(self) -> Tensor:
        """fp64 [2, metrics]: this rank's metric sums and counts since the last call (model.stats)."""
        return self.stage.stats.take(self.layout.device)

    def describe(self) -> str:
        """One line: the layout and how the layers were cut."""
        costs = stage_costs([spec.training_flops for spec in self.specs], self.bounds)
        cut = ", ".join(
            f"{self.specs[start].name}..{self.specs[stop - 1].name} {100 * cost / sum(costs):.0f}%"
            for (start, stop), cost in zip(itertools.pairwise(self.bounds), costs, strict=True)
        )
        batches = f"{self.num_micro_batches} micro-batches of {self.micro_batch_size}"
        return f"{self.layout.name}, {batches}, {self.config.parallel.precision}; stages: {cut}"

    def _deepspeed_config(self) -> dict[str, Any]:
        config = self.config
        # All gradients in a few buckets; DeepSpeed's default of 5e8 elements would be allocated whatever the model's size.
        num_parameters = sum(parameter.numel() for parameter in self.stage.parameters())
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": config.optimizer.gradient_clipping,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": 1,
                "reduce_bucket_size": min(num_parameters + 1, 200_000_000),
                "allgather_bucket_size": 500_000_000,
                # The contiguous buffer helps ZeRO-2 under long backward passes; here it would be one more copy.
                "contiguous_gradients": False,
                "overlap_comm": False,
            },
            # A partitioned edge and reentrant recomputation break single-tensor edges under tensor parallelism.
            "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
            "steps_per_print": None,
            "wall_clock_breakdown": False,
            "communication_data_type": "fp32",
        }
        if config.parallel.precision == "bf16":
            settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        return settings


def build_stage(config: RunConfig, layout: Layout, specs: Sequence[LayerSpec], bounds: Sequence[int]) -> PipelineStage:
    """This rank's stage, its parameters not yet filled."""
    start, stop = bounds[layout.stage], bounds[layout.stage + 1]
    return PipelineStage(
        specs[start:stop],
        config=config.model,
        previous=specs[start - 1] if start else None,
        is_last=layout.is_last_stage,
        recompute=config.parallel.recompute,
    )


def _start_deepspeed(
    stage: PipelineStage, specs: Sequence[LayerSpec], bounds: Sequence[int], config: RunConfig, layout: Layout, settings: dict[str, Any]
) -> Any:
    """DeepSpeed's engine around `stage`. Imported here: its import takes seconds and reads DS_ACCELERATOR."""
    with _quiet():
        import deepspeed
        from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
        from deepspeed.utils.timer import NoopTimer

        from pipeline.parallel.deepspeed_module import OneModulePerStage, Prebuilt

        # On a CPU DeepSpeed would compile a shared-memory all-reduce at the first start, which training never calls: half a minute, a
        # compiler, and a lock file that makes every later start wait for ever if one is killed while it builds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Wraps the process group that exists; it starts none of its own.
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
        topology = PipeModelDataParallelTopology(num_pp=layout.pipe, num_mp=layout.tensor, num_dp=layout.data)
        module = OneModulePerStage(
            # DeepSpeed builds the spec of its own stage only, so every spec may hold this rank's stage.
            [DeepSpeedLayerSpec(Prebuilt, stage) for _ in range(layout.pipe)],
            topology=topology,
            # The rows of a flow edge depend on how many examples of a micro-batch are trained (model.flow.rows).
            dynamic_shape=any(specs[bound - 1].in_flow for bound in bounds[1:-1]),
            tensor_group=layout.tensor_group,
        )
        is_fused = fuses_weight_gradients(config, layout)
        optimizer = build_optimizer(stage, config.optimizer, layout.device, config.kernels.optimizer)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        engine.timers = NoopTimer()  # the default one keeps an event per step for ever
        _spare_copies(engine, layout)
        if hasattr(engine.optimizer, "accumulate_hp_grads_and_remove_lp"):  # the bf16 one
            module.sum_gradients_together(engine.optimizer)
        if is_fused:
            module.fuse_weight_gradients(engine.optimizer)
        assert_same_grid(layout, engine.grid)
    return engine


def check_forced_kernels(config: RunConfig, layout: Layout) -> None:
    """Refuses, before anything is opened or built, what `kernels.*` forces and this machine or layout cannot do.

    Raises:
        UserError: an implementation cannot run here.
    """
    check_kernels(config.kernels, layout.device, _parameter_dtype(config))
    fuses_weight_gradients(config, layout)


def fuses_weight_gradients(config: RunConfig, layout: Layout) -> bool:
    """Whether Megatron-core's linears add their weight gradients to the fp32 accumulator inside the matrix product.

    Raises:
        UserError: `kernels.gradient_accumulation_fusion=on` where that is impossible.
    """
    requested = config.kernels.gradient_accumulation_fusion
    obstacle = ""
    if layout.tensor == 1:
        obstacle = "parallel.tensor=1: there are no Megatron-core linears"
    elif config.kernels.compile != "off":
        obstacle = f"kernels.compile={config.kernels.compile}: the compiler cannot see into the fused product"
    if obstacle and requested == "on":
        raise UserError(
            "kernels.gradient_accumulation_fusion=on cannot run here",
            got=obstacle,
            expected="parallel.tensor of 2 or more, parallel.precision=bf16 and kernels.compile=off",
            fix="set kernels.gradient_accumulation_fusion=auto",
        )
    return not obstacle and choose("gradient_accumulation_fusion", requested, layout.device, _parameter_dtype(config)) == "on"


def _parameter_dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32


def _spare_copies(engine: Any, layout: Layout) -> None:
    """Takes work out of DeepSpeed's step that a run of this layout does not need (tests/benchmarks/bench_engine.py).

    It flattens all gradients into fresh memory, whose first touch costs more than the copy on a CPU (a GPU's allocator hands out the
    same memory again, and buffers of our own would be held beside it); and it does so once more for a reduction over the
    data-parallel ranks even where there is one.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "flatten") and layout.device.type == "cpu":
        optimizer.flatten = FlatBuffers()
    if layout.data == 1:
        if hasattr(optimizer, "buffered_reduce_fallback"):
            optimizer.buffered_reduce_fallback = lambda *arguments, **options: None
        else:  # with bf16 parameters the engine reduces the fp32 accumulators itself
            engine.pipeline_enable_backward_allreduce = False


class FlatBuffers:
    """Flattens lists of tensors into one buffer per size, used again at the next call of that size."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """All elements in order, 1-D; valid until the next call with as many."""
        key = sum(tensor.numel() for tensor in tensors), tensors[0].dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(key[0], dtype=key[1], device=tensors[0].device)
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors], out=self._buffers[key])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps DeepSpeed's and Megatron's start-up chatter off the console; warnings and errors still show."""
    # torch renamed a collective that DeepSpeed calls every step.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
        for name in ("DeepSpeed", "deepspeed"):
            logging.getLogger(name).setLevel(logging.WARNING)
