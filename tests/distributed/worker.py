"""One process of the layout test: `python -m tests.distributed.worker OUT_DIR RANK SIZE PORT`.

Runs every scenario on every layout, then continues every layout's checkpoint of step 3 on every layout. Each rank writes
what it saw as JSON, and all together the weights as checkpoints, for the test process to compare.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from configs.loader import build_config
from model import init
from model.batch import Batch, NoiseSettings, draw_drop_prefix, draw_text_first, make_batch
from model.config import JetFormerConfig
from model.flow.coupling import Coupling
from model.jetformer import build_jetformer
from model.parallel import global_shape, shard_of
from model.stats import summarise
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.writer import save
from pipeline.config import RunConfig
from pipeline.engine import Engine
from pipeline.optim import build_optimizer
from pipeline.parallel import stage as stage_module
from pipeline.parallel.environment import ProcessEnvironment
from pipeline.parallel.layout import Layout, setup_layout, teardown_layout

LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1))
"""(tensor, pipeline, data) degrees; the first is the reference."""
MORE_LAYOUTS = ((1, 4, 1),)
"""Trained, not resumed: with 4 stages one cut falls inside the flow."""
SAVED_STEP, NUM_STEPS = 3, 8
LEARNING_RATE = 3e-3
SMOOTH_EPS = 1e-3
"""Of Adam, about the size of a gradient element: updates then follow gradients smoothly. With a small one the first updates move every weight
by the learning rate whatever its gradient, and rounding that turns the sign of a small gradient grows into percents of the next norms."""
NUM_SAMPLES = 97

BASE: dict[str, Any] = {
    "model": {
        "image": {"resolution": 8, "channels": 1, "patch_size": 2},
        "text": {"length": 5, "num_pieces": 20, "logits_init_std": 0.3},
        "flow": {"depth": 3, "block_depth": 1, "width": 16, "num_heads": 2},
        "decoder": {"width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 1, "head_dim": 8, "dropout": 0.1},
        "gmm": {"num_mixtures": 6, "soft_dim": 2},
        "objective": {"text_loss_weight": 0.5},
    },
    "data": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"gradient_clipping": 0.1, "ema_decay": 0.9},
    "device": "cpu",
}

SCENARIOS: dict[str, tuple[int, dict[str, Any]]] = {
    "base": (NUM_STEPS, {}),
    "recompute": (3, {"parallel": {"recompute": "full"}}),
    "smooth": (3, {"optimizer": {"eps": SMOOTH_EPS}}),
    "bf16": (3, {"parallel": {"precision": "bf16"}, "optimizer": {"eps": SMOOTH_EPS}}),
    "unclipped": (2, {"optimizer": {"gradient_clipping": 0.0}}),
    # One example per micro-batch: under tensor parallelism some ranks have no image of their own.
    "single": (3, {"data": {"global_batch_size": 4, "micro_batch_size": 1}}),
    "prefix": (
        3,
        {
            "model": {
                "text": {"ignore_pad": True},
                "flow": {"kinds": ["channels", "checkerboard", "hstripes-inv"]},
                "decoder": {"num_kv_heads": 2},
                "objective": {"loss_on_prefix": True, "stop_grad_flow_on_image_prefix": False},
            }
        },
    ),
}
"""Name -> (steps, changes to BASE)."""


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, group by group."""
    both = dict(below)
    for key, value in above.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def scenario_config(name: str, tensor: int = 1, pipeline: int = 1) -> RunConfig:
    """The run of a scenario on a layout."""
    return build_config(RunConfig, merged(merged(BASE, SCENARIOS[name][1]), {"parallel": {"tensor": tensor, "pipeline": pipeline}}))


def synthetic_batch(config: RunConfig, step: int, start: int, size: int) -> Batch:
    """Samples [start, start + size) of a step's global batch: a function of their global positions alone."""
    model = config.model
    first = step * config.data.global_batch_size
    positions = torch.arange(first + start, first + start + size)
    generator = torch.Generator().manual_seed(11)
    side = model.image.resolution
    images = torch.randint(0, 256, (NUM_SAMPLES, side, side, model.image.channels), generator=generator, dtype=torch.uint8)
    texts = torch.randint(2, model.text.num_pieces, (NUM_SAMPLES, model.text.length), generator=generator)
    lengths = torch.randint(1, model.text.length + 1, (NUM_SAMPLES, 1), generator=generator)
    rows = positions % NUM_SAMPLES
    slots = torch.arange(model.text.length)
    mask = slots < lengths[rows] if model.text.ignore_pad else torch.ones(size, model.text.length, dtype=torch.bool)
    options: dict[str, Any] = {}
    if model.objective.loss_on_prefix:
        everyone = torch.arange(first, first + config.data.global_batch_size)
        dropped = draw_drop_prefix(model.objective, config.seed, everyone, draw_text_first(model.objective, config.seed, everyone))
        options["valid_text_fraction"] = 1.0 - float(dropped.double().mean())
    return make_batch(
        model,
        positions=positions,
        text=texts[rows],
        text_mask=mask,
        text_loss=mask.clone(),
        image=images[rows],
        noise=NoiseSettings(seed=config.seed, sigma=20.0, train=True),
        **options,
    )


def step_batches(config: RunConfig, step: int, *, data_rank: int, data_degree: int, micro_batch_size: int) -> list[Batch]:
    """The micro-batches of one data-parallel rank."""
    share = config.data.global_batch_size // data_degree
    starts = range(data_rank * share, (data_rank + 1) * share, micro_batch_size)
    return [synthetic_batch(config, step, start, micro_batch_size) for start in starts]


def initialise_busily(named_parameters: Iterator[tuple[str, torch.nn.Parameter]], config: JetFormerConfig, seed: int) -> None:
    """The usual start plus noise on every tensor: with the zeros of a real start, most gradients would be zero and prove nothing."""
    for name, parameter in named_parameters:
        INITIALISE([(name, parameter)], config, seed)
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"))
        noise, shard = 0.1 * torch.randn(global_shape(parameter), generator=generator), shard_of(parameter)
        with torch.no_grad():
            parameter += noise if shard is None else noise.narrow(shard.dim, shard.start, shard.size)


INITIALISE = init.initialise


@dataclasses.dataclass
class Record:
    """What a run leaves behind for comparison."""

    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    flow_backwards: int = 0
    """Backward passes of the first coupling on this rank."""
    bits_sent: list[str] = dataclasses.field(default_factory=list)
    bits_received: list[str] = dataclasses.field(default_factory=list)


def run_steps(engine: Engine, steps: Sequence[int], record: Record, checkpoint_at: dict[int, Path] | None = None) -> None:
    """Trains through `steps` (0-based), saving after the step counts in `checkpoint_at`."""
    config, layout = engine.config, engine.layout
    for step in steps:
        batches = step_batches(config, step, data_rank=layout.data_rank, data_degree=layout.data, micro_batch_size=engine.micro_batch_size)
        result = engine.train_step(batches, LEARNING_RATE)
        assert result.is_finite
        sums = engine.take_stats()
        dist.all_reduce(sums)
        record.losses.append(summarise(sums)["loss"])
        record.norms.append(float(result.grad_norm))
        if checkpoint_at and step + 1 in checkpoint_at:
            save(checkpoint_at[step + 1], step + 1, engine.zero.fragments(), {"adam_step": engine.zero.adam_step})


def counting_flow_backwards(record: Record) -> Any:
    """Counts the backward passes that go through the first coupling."""
    forward = Coupling.advance

    def counted(self: Coupling, *args: Any) -> Any:
        out, logdet, raw_scale = forward(self, *args)
        if out[0].requires_grad and getattr(self, "counts", False):
            out[0].register_hook(lambda grad: setattr(record, "flow_backwards", record.flow_backwards + 1))
        return out, logdet, raw_scale

    return mock.patch.object(Coupling, "advance", counted)


def watching_edges(record: Record) -> Any:
    """Remembers the bits of the latents or soft tokens that leave a stage, and of those that arrive at the next."""
    pack, unpack = stage_module.pack, stage_module.unpack

    def digest(values: torch.Tensor) -> str:
        return hashlib.sha256(values.detach().contiguous().numpy().tobytes()).hexdigest()

    def watched_pack(state: Any, dtype: torch.dtype) -> torch.Tensor:
        record.bits_sent.append(digest(state.x if state.soft is None else state.soft))
        return pack(state, dtype)

    def watched_unpack(edge: torch.Tensor, **sizes: Any) -> Any:
        state = unpack(edge, **sizes)
        record.bits_received.append(digest(state.x if state.soft is None else state.soft))
        return state

    return mock.patch.multiple(stage_module, pack=watched_pack, unpack=watched_unpack)


def run_scenario(name: str, layout: Layout, out: Path) -> None:
    """Trains one scenario from scratch."""
    record = Record()
    num_steps, _ = SCENARIOS[name]
    folder = out / layout_name(layout) / name
    saved = {SAVED_STEP: folder / "saved", num_steps: folder / "final"} if name == "base" else {num_steps: folder / "final"}
    config = scenario_config(name, layout.tensor, layout.pipe)
    with mock.patch.object(init, "initialise", initialise_busily), counting_flow_backwards(record), watching_edges(record):
        engine = Engine(config, layout)
        for module_name, module in engine.stage.named_modules():
            if module_name == "couplings.0":
                module.counts = True  # type: ignore[assignment]
        run_steps(engine, range(num_steps), record, saved)
    write_records(record, folder, layout)


def run_resume(source: Path, name: str, layout: Layout, out: Path) -> None:
    """Continues another layout's checkpoint of step SAVED_STEP to the end."""
    record = Record()
    engine = Engine(scenario_config("base", layout.tensor, layout.pipe), layout)
    with open_checkpoint(source) as reader:
        engine.zero.load(reader, adam_step=reader.state["adam_step"])
    folder = out / layout_name(layout) / f"resume-{name}"
    run_steps(engine, range(SAVED_STEP, NUM_STEPS), record, {NUM_STEPS: folder / "final"})
    write_records(record, folder, layout)


def run_plain_loop(out: Path) -> None:
    """The same steps as scenario `base`, without engine or DeepSpeed: the independent witness."""
    config = scenario_config("base")
    model = build_jetformer(config.model, seed=config.seed)
    initialise_busily(model.named_parameters(), config.model, config.seed)
    optimizer = build_optimizer(model, dataclasses.replace(config.optimizer, learning_rate=LEARNING_RATE), torch.device("cpu"))
    record = Record()
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        batches = step_batches(config, step, data_rank=0, data_degree=1, micro_batch_size=config.data.micro_batch_size or 1)
        losses = []
        for batch in batches:
            loss = model(batch).total_loss()
            (loss / len(batches)).backward()
            losses.append(loss.item())
        record.losses.append(sum(losses) / len(losses))
        record.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)))
        optimizer.step()
    folder = out / "plain"
    folder.mkdir(parents=True)
    (folder / "record-0.json").write_text(json.dumps(dataclasses.asdict(record)))
    torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, folder / "weights.pt")


def write_records(record: Record, folder: Path, layout: Layout) -> None:
    """One JSON per rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"record-{layout.rank}.json").write_text(json.dumps(dataclasses.asdict(record)))
    dist.barrier()


def layout_name(layout: Layout) -> str:
    """tensor-pipeline-data, e.g. 2-2-1."""
    return f"{layout.tensor}-{layout.pipe}-{layout.data}"


class Worlds:
    """Process groups of several sizes, one after another, over the same processes: imports are paid once."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank, self.size = rank, size
        self._store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(minutes=5))
        self._count = 0

    @contextlib.contextmanager
    def layout(self, tensor: int, pipeline: int, data: int) -> Iterator[Layout | None]:
        """The layout of this rank; None on ranks that it does not need."""
        self._count += 1
        size = tensor * pipeline * data
        if self.rank < size:
            dist.init_process_group("gloo", store=dist.PrefixStore(f"world-{self._count}", self._store), rank=self.rank, world_size=size)
            environment = ProcessEnvironment(rank=self.rank, world_size=size, local_rank=self.rank, master_addr="127.0.0.1")
            layout = setup_layout(scenario_config("base", tensor, pipeline), environment)
            yield layout
            teardown_layout(layout)
        else:
            yield None
        if self._store.add(f"left-{self._count}", 1) == self.size:
            self._store.set(f"all-left-{self._count}", "")
        self._store.wait([f"all-left-{self._count}"])


def main(out: Path, rank: int, size: int, port: int) -> None:
    """All scenarios on all layouts, then all resumes."""
    worlds = Worlds(rank, size, port)
    for degrees in (*LAYOUTS, *MORE_LAYOUTS):
        with worlds.layout(*degrees) as layout:
            for name in SCENARIOS:
                if layout is not None:
                    run_scenario(name, layout, out)
    for degrees in LAYOUTS:
        with worlds.layout(*degrees) as layout:
            for source in LAYOUTS:
                if layout is not None:
                    run_resume(out / "-".join(map(str, source)) / "base" / "saved", "-".join(map(str, source)), layout, out)
    if rank == size - 1:
        run_plain_loop(out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *(int(text) for text in sys.argv[2:]))
