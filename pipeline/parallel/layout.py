"""Ranks to (pipe, data, tensor) coordinates, the process groups, and the device.

Tensor varies fastest, then data, then pipe: rank = (pipe * data_degree + data) * tensor_degree + tensor. That is the order of
both DeepSpeed's PipeModelDataParallelTopology and Megatron's parallel_state, so tensor-parallel peers sit on one node.
"""

import datetime
import logging
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import UserError
from model.parallel import TensorParallel
from pipeline.config import RunConfig
from pipeline.parallel.environment import ProcessEnvironment, is_given_gpus

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
"""After this a collective that a dead peer never joins raises, instead of hanging for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    tensor: int
    """Tensor-parallel degree."""
    data: int
    """Data-parallel degree."""
    pipe: int
    """Pipeline degree."""
    device: torch.device
    tensor_group: Any = field(default=None, repr=False)
    """Process group of the ranks that share every layer; None with degree 1."""
    control_group: Any = field(default=None, repr=False)
    """gloo group of all ranks, for objects and checkpoints; None: the default group is one."""

    @property
    def tensor_rank(self) -> int:
        """Coordinate on the tensor axis."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Coordinate on the data axis."""
        return self.rank // self.tensor % self.data

    @property
    def stage(self) -> int:
        """Coordinate on the pipe axis: which stage this rank runs."""
        return self.rank // (self.tensor * self.data)

    @property
    def is_first_stage(self) -> bool:
        """Whether images enter here."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.stage == self.pipe - 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the console and the run's files."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether the whole model sits in this process (tensor and pipeline degree 1)."""
        return self.tensor == self.pipe == 1

    def neighbour(self, offset: int) -> int:
        """Global rank with the same data and tensor coordinates, `offset` stages later."""
        return self.rank + offset * self.tensor * self.data

    @property
    def tensor_parallel(self) -> TensorParallel:
        """What the model's layers are built with."""
        return TensorParallel(size=self.tensor, rank=self.tensor_rank, group=self.tensor_group)

    @property
    def name(self) -> str:
        """For logs, e.g. `tp2 pp1 dp4`."""
        return f"tp{self.tensor} pp{self.pipe} dp{self.data}"


def check_layout(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Refuses a world size, batch or layout that cannot work, before anything heavy starts.

    Returns:
        (examples per micro-batch, micro-batches per step) of one data-parallel rank.

    Raises:
        UserError: naming the numbers that do not fit and what to change.
    """
    try:
        micro_batch_size, num_micro_batches = config.micro_batches(world_size)
    except ValueError as error:
        raise UserError(
            "the run does not fit the number of processes",
            got=str(error),
            fix="change parallel.*, data.* or the number of processes",
        ) from None
    # Patchify shares a stage with the first coupling: it has no parameters.
    num_cuttable = config.model.flow.depth + config.model.decoder.depth + 2
    if config.parallel.pipeline > num_cuttable:
        raise UserError(
            "more pipeline stages than layers to put in them",
            got=f"parallel.pipeline={config.parallel.pipeline}",
            expected=f"at most {num_cuttable}",
            fix="lower parallel.pipeline, or deepen the model",
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA device is visible", fix="set device=cpu, or run `jetway doctor`")
    return micro_batch_size, num_micro_batches


def choose_device(config: RunConfig, local_rank: int, world_size: int) -> torch.device:
    """cuda:local_rank where CUDA is wanted and present, else the CPU.

    A process that is shown one GPU takes that, whatever its local rank: srun --gpus-per-task=1 gives each task its own.

    Raises:
        UserError: more processes on this node than GPUs.
    """
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and is_given_gpus():
        return torch.device("cuda", 0)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            "more processes on this node than GPUs",
            got=f"local rank {local_rank} of {world_size} processes",
            expected=f"at most {torch.cuda.device_count()} per node",
            fix="start fewer processes, or set device=cpu",
        )
    return torch.device("cuda", local_rank)


def set_matmul_precision(device: torch.device, *, tf32: bool) -> None:
    """fp32 matrix products of this process on CUDA: TF32 or full fp32 (`kernels.tf32`). Products on a CPU stay as they are."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


def setup_layout(config: RunConfig, environment: ProcessEnvironment | None = None) -> Layout:
    """Joins the process group (gloo on CPU, nccl on CUDA) and finds this rank's place in it.

    Raises:
        UserError: the layout does not fit the processes or the GPUs.
    """
    environment = environment or ProcessEnvironment.detect()
    try:
        data = config.data_parallel_degree(environment.world_size)
    except ValueError as error:
        raise UserError("the run does not fit the number of processes", got=str(error), fix="change parallel.* or start another number") from None
    if config.deterministic:
        # Read by cuBLAS when CUDA starts in this process: before `set_device`.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = choose_device(config, environment.local_rank, environment.world_size)
    environment.export()
    # DeepSpeed decides between CPU and CUDA once, when it is first imported.
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed sets the device of this number
    set_matmul_precision(device, tf32=config.kernels.tf32)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if environment.master_addr is None:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(
                backend, init_method="env://", rank=environment.rank, world_size=environment.world_size, timeout=COLLECTIVE_TIMEOUT
            )
    tensor, pipe = config.parallel.tensor, config.parallel.pipeline
    control_group = dist.new_group(backend="gloo") if device.type == "cuda" else None
    if device.type == "cuda":
        _check_own_gpu(str(torch.cuda.get_device_properties(device).uuid), control_group)
    return Layout(
        rank=environment.rank,
        world_size=environment.world_size,
        local_rank=environment.local_rank,
        tensor=tensor,
        data=data,
        pipe=pipe,
        device=device,
        tensor_group=_megatron_tensor_group(tensor, pipe) if tensor > 1 else None,
        control_group=control_group,
    )


def _check_own_gpu(gpu: str, group: Any) -> None:
    """nccl would hang or fail on two ranks with one GPU, in its own words. Collective over `group`, with the same result on every rank."""
    gpus: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(gpus, gpu, group=group)
    ranks_of = Counter(gpus)
    shared = [rank for rank, one in enumerate(gpus) if ranks_of[one] > 1]
    if shared:
        raise UserError(
            "two processes were given the same GPU",
            got=f"ranks {', '.join(map(str, shared[:8]))} share GPUs",
            expected="one GPU per process",
            fix="start as many processes per node as it has GPUs, and let CUDA_VISIBLE_DEVICES name all of them or each process its own",
        )


def teardown_layout(layout: Layout) -> None:
    """Leaves the process group, at the end of a run that all ranks end together."""
    if layout.tensor > 1:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _megatron_tensor_group(tensor: int, pipe: int) -> Any:
    """Initialises Megatron's parallel state, so that its layers and helpers agree with ours, and takes the group from it."""
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the optional Transformer Engine and Apex are not installed
        from megatron.core import parallel_state
    logging.disable(previous)

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipe)
    return parallel_state.get_tensor_model_parallel_group()


def assert_same_grid(layout: Layout, grid: Any) -> None:
    """DeepSpeed's grid, Megatron's state and `layout` must name the same ranks: a mix-up would train silently wrong."""
    assert grid.get_stage_id() == layout.stage, (grid.get_stage_id(), layout)
    assert grid.get_data_parallel_rank() == layout.data_rank, (grid.get_data_parallel_rank(), layout)
    assert grid.get_slice_parallel_rank() == layout.tensor_rank, (grid.get_slice_parallel_rank(), layout)
    first = layout.rank - layout.tensor_rank
    assert list(grid.slice_group) == list(range(first, first + layout.tensor)), (grid.slice_group, layout)
    if layout.tensor > 1:
        from megatron.core import parallel_state

        assert dist.get_process_group_ranks(layout.tensor_group) == list(grid.slice_group)
        assert parallel_state.get_data_parallel_rank() == layout.data_rank
        assert parallel_state.get_pipeline_model_parallel_rank() == layout.stage
