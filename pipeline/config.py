"""One training run as data: model, data, batch, optimiser, layout, checkpoints, logging. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from model.config import JetFormerConfig
from model.kernels.config import KernelsConfig

Recompute = Literal["none", "flow", "decoder", "full"]


def _check_at_least(section: str, config: object, minimum: int, *names: str) -> None:
    """Raises ValueError for a field below `minimum`; None is left alone."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{section}.{name}={value} must be at least {minimum}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the samples come from, and how many make one optimiser step."""

    path: str = "data"
    """Data set folder or s3:// prefix written by `jetway prep`."""
    split: str = "train"
    eval_split: str = "heldout"
    generation: int | None = None
    """Manifest generation; None is the newest at the first start, then the one recorded in the checkpoint."""
    shuffle_window_shards: int = 16
    """Shards whose samples are shuffled among each other; what fits a node's cache."""
    global_batch_size: int = 64
    """Examples per optimiser step, over all processes."""
    micro_batch_size: int | None = None
    """Examples per forward pass of one data-parallel rank; None: all of the rank's share at once."""
    num_prefetch: int = 4
    """Micro-batches prepared ahead by each process's reader thread."""
    text: Literal["caption", "label"] = "caption"
    """What stands in the text slots: the caption's tokens, or the integer `label` of the sample's JSON (class-conditional)."""
    flip_lr: bool = False
    """Mirror half of the training images (class-conditional recipe)."""

    def __post_init__(self) -> None:
        _check_at_least("data", self, 1, "global_batch_size", "micro_batch_size", "shuffle_window_shards")
        _check_at_least("data", self, 0, "num_prefetch")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and schedule of spec 1.9, in torch terms: `weight_decay` multiplies the learning rate."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    """Maximum global gradient norm over all parameters and ranks; 0 clips nothing."""
    warmup_fraction: float = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: float = 0.2
    """Share of the run spent decaying to zero (schedule `wsd` only)."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights; None keeps none (reference)."""

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate} must not be negative")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"optimizer.ema_decay={self.ema_decay} must lie in 0..1, below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurriculumConfig:
    """RGB noise, falling over training on a cosine (spec 1.2), in 8-bit grey levels."""

    sigma_start: float = 64.0
    sigma_end: float = 3.0
    total_steps: int | None = None
    """Length of the curriculum; None: the run's `total_steps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Degrees of the three axes; the data-parallel one is what the world size leaves."""

    tensor: int = 1
    pipeline: int = 1
    data: int | None = None
    """Data-parallel degree; None: world size / (tensor * pipeline)."""
    processes: int = 1
    """Processes that `jetway train` starts on this machine; ignored under torchrun and srun."""
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Recompute = "none"
    """Layers of which only the inputs are kept for the backward pass, which runs them again: the couplings (`flow`), the decoder's blocks
    (`decoder`), or both (`full`). The flow holds most memory per FLOP. The heads keep nothing of their outputs in any case."""

    def __post_init__(self) -> None:
        _check_at_least("parallel", self, 1, "tensor", "pipeline", "data", "processes")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = 1000
    keep_last: int = 2
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this are never deleted."""
    resume: bool = True
    """Continue from the newest good checkpoint in the run's folder."""

    def __post_init__(self) -> None:
        _check_at_least("checkpoint", self, 1, "keep_last", "keep_every_steps")
        _check_at_least("checkpoint", self, 0, "every_steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Metrics and their mirrors."""

    every_steps: int = 20
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "jetway"
    peak_tflops: float | None = None
    """Dense peak of one device, for MFU; None: known GPUs by name, otherwise measured once on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How images and captions are drawn (spec 1.10)."""

    prompts: tuple[str, ...] = ()
    """Prompts of the grids drawn during training; empty: captions of held-out samples."""
    cfg_scale: float = 4.0
    """Classifier-free guidance weight w."""
    cfg_rule: Literal["analytic", "clipped", "rejection"] = "analytic"
    """`rejection` is the reference's sampler, for parity of published figures; `clipped` is `analytic` without its outliers at large scales."""
    temperature: float = 0.95
    """Multiplies the scales of the mixture."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation during training and by `jetway eval`."""

    every_steps: int = 1000
    """0: only at the end."""
    num_examples: int | None = None
    """Held-out examples per evaluation; None: all."""
    batch_size: int = 64
    seed: int = 0
    """Fixes dequantisation noise, so that two evaluations of one model agree exactly."""
    sample_every_steps: int = 1000
    """Draw a grid for the report at these steps (0: only at the end)."""
    num_samples: int = 10

    def __post_init__(self) -> None:
        _check_at_least("eval", self, 1, "batch_size", "num_examples")
        _check_at_least("eval", self, 0, "every_steps", "sample_every_steps", "num_samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run. The cross-field rules that need no files and no processes are checked here."""

    name: str = "run"
    output_dir: str = "runs/run"
    seed: int = 0
    """Base of every random stream: order, noise, drops, initial weights."""
    total_steps: int = 10_000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """Bit-reproducible kernels on CUDA (CPU runs always are)."""
    model: JetFormerConfig = field(default_factory=JetFormerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        tensor, heads, mixtures = self.parallel.tensor, self.model.decoder.num_heads, self.model.gmm.num_mixtures
        if tensor > heads or heads % tensor:
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.decoder.num_heads={heads}: tensor parallelism splits attention by heads"
            )
        if mixtures % tensor:
            raise ValueError(f"parallel.tensor={tensor} does not divide model.gmm.num_mixtures={mixtures}: the image head is split by mixtures")
        if self.model.decoder.mlp_dim % tensor:
            raise ValueError(f"parallel.tensor={tensor} does not divide model.decoder.mlp_dim={self.model.decoder.mlp_dim}")
        kv_heads = self.model.decoder.num_kv_heads
        if kv_heads % tensor and tensor % kv_heads:
            raise ValueError(f"parallel.tensor={tensor} and model.decoder.num_kv_heads={kv_heads}: one must divide the other")
        num_layers = self.model.flow.depth + self.model.decoder.depth + 3
        if self.parallel.pipeline > num_layers:
            raise ValueError(f"parallel.pipeline={self.parallel.pipeline} is more than the model's {num_layers} layers")
        if self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps} must be at least 1")

    def data_parallel_degree(self, world_size: int) -> int:
        """dp for this many processes.

        Raises:
            ValueError: the world size does not hold a whole number of model replicas, or contradicts `parallel.data`.
        """
        tensor, pipeline = self.parallel.tensor, self.parallel.pipeline
        if world_size % (tensor * pipeline):
            raise ValueError(
                f"{world_size} processes are not divisible by parallel.tensor * parallel.pipeline = {tensor} * {pipeline}: "
                f"start a multiple of {tensor * pipeline}"
            )
        degree = world_size // (tensor * pipeline)
        if self.parallel.data is not None and self.parallel.data != degree:
            raise ValueError(
                f"parallel.data={self.parallel.data}, but {world_size} processes leave {degree}: set parallel.data to null or start more"
            )
        return degree

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """(examples per micro-batch, micro-batches per step) of one data-parallel rank.

        Raises:
            ValueError: the global batch does not divide into them.
        """
        degree, batch = self.data_parallel_degree(world_size), self.data.global_batch_size
        if batch % degree:
            raise ValueError(f"data.global_batch_size={batch} is not divisible by the data-parallel degree {degree}")
        share = batch // degree
        micro = self.data.micro_batch_size or share
        if share % micro:
            raise ValueError(
                f"data.global_batch_size={batch} gives each of {degree} ranks {share} examples: not divisible by data.micro_batch_size={micro}"
            )
        return micro, share // micro
