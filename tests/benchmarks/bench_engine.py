"""One optimiser step through the engine at one process, against the same model in a plain PyTorch loop.

    python -m tests.benchmarks.bench_engine [--config train/digits] [--steps 30] [key=value ...]

Both run in this process, turn by turn, on the same micro-batches, so that other load on the machine falls on both. Prints the
ratio, and writes a dated report beside this file. Before timing, the two are checked to compute the same step.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

from configs.loader import load_config
from model.batch import Batch
from model.jetformer import JetFormer, build_jetformer
from pipeline.config import RunConfig
from pipeline.engine import Engine
from pipeline.optim import build_optimizer
from pipeline.parallel.layout import Layout, setup_layout, teardown_layout
from tests.benchmarks.bench_batches import random_batches

REPORTS = Path(__file__).parent / "reports"
TARGET = 1.15


class PlainLoop:
    """What a notebook would do: backward over the micro-batches, clip, AdamW."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.model: JetFormer = build_jetformer(config.model, seed=config.seed, device=device)
        self.optimizer = build_optimizer(self.model, config.optimizer, device)
        self.max_norm = config.optimizer.gradient_clipping

    def step(self, batches: Sequence[Batch], learning_rate: float) -> float:
        """One optimiser step; returns the gradient norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            (self.model(batch).total_loss() / len(batches)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return float(norm)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(config: RunConfig, layout: Layout, num_steps: int) -> tuple[list[float], list[float]]:
    """Seconds per step of the engine and of the plain loop, pairwise."""
    engine, plain = Engine(config, layout), PlainLoop(config, layout.device)
    batches = random_batches(config, engine.micro_batch_size, engine.num_micro_batches, layout.device)
    for _ in range(3):
        found, expected = float(engine.train_step(batches, 1e-3).grad_norm), plain.step(batches, 1e-3)
        assert abs(found - expected) <= 1e-3 * expected, f"the engine's gradient norm is {found}, the plain loop's {expected}"
    pairs = []
    for turn in range(num_steps):
        sides = [lambda: engine.train_step(batches, 1e-3), lambda: plain.step(batches, 1e-3)]
        order = (0, 1) if turn % 2 else (1, 0)
        timed = {side: seconds(sides[side], layout.device) for side in order}
        pairs.append((timed[0], timed[1]))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def main(argv: Sequence[str]) -> int:
    """Runs the comparison and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="train/digits")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    layout = setup_layout(config)
    engine, plain = compare(config, layout, arguments.steps)
    teardown_layout(layout)
    ratio = statistics.median(a / b for a, b in zip(engine, plain, strict=True))
    device = torch.cuda.get_device_name() if layout.device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    lines = [
        f"# Engine against a plain loop, {date.today().isoformat()}",
        "",
        f"`{arguments.config}` {' '.join(arguments.overrides)}, batch {config.data.global_batch_size}, {config.parallel.precision}; {device}; "
        f"torch {torch.__version__}; {arguments.steps} steps each, turn by turn.",
        "",
        "| | median s/step | fastest s/step |",
        "|---|---|---|",
        f"| engine (DeepSpeed PipelineEngine, ZeRO-1) | {statistics.median(engine):.4f} | {min(engine):.4f} |",
        f"| plain PyTorch loop | {statistics.median(plain):.4f} | {min(plain):.4f} |",
        "",
        f"Median of the pairwise ratios: **{ratio:.3f}** (aim: at most {TARGET}); ratio of the fastest steps: {min(engine) / min(plain):.3f}.",
    ]
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"{date.today().isoformat()}-engine-{Path(arguments.config).stem}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
