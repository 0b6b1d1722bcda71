"""One process of the test of fused weight gradients: `python -m tests.distributed.fused_gradients OUT_DIR RANK SIZE PORT`.

Trains the same steps on tensor-parallel ranks without and with the fusion. apex is not here: `stub/fused_weight_gradient_mlp_cuda.py`
stands in, found through PYTHONPATH as the extension would be. It rounds its product as the plain path does, so both runs must be equal.
"""

import dataclasses
import hashlib
import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch

from model import init
from pipeline import engine as engine_module
from pipeline.engine import Engine
from pipeline.parallel.layout import Layout
from tests.distributed.worker import Record, Worlds, initialise_busily, run_steps, scenario_config

NUM_STEPS = 3


def run(layout: Layout, *, fused: bool, recompute: bool) -> dict[str, object]:
    """What a run computes, and how many products were fused."""
    stand_in = importlib.import_module("fused_weight_gradient_mlp_cuda")

    config = scenario_config("bf16", layout.tensor, layout.pipe)
    if recompute:
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, recompute="full"))
    record, calls = Record(), len(stand_in.CALLS)
    with (
        mock.patch.object(init, "initialise", initialise_busily),
        # The engine's only choice; the optimiser makes its own in pipeline.optim.
        mock.patch.object(engine_module, "choose", return_value="on" if fused else "off"),
    ):
        engine = Engine(config, layout)
    run_steps(engine, range(NUM_STEPS), record)
    weights = {name: digest(parameter) for name, parameter in engine.stage.named_parameters()}
    with_main_grad = sum(hasattr(parameter, "main_grad") for parameter in engine.stage.parameters())
    left = max(float(buffer.abs().max()) for buffer in engine._deepspeed.optimizer.fp32_groups_gradients_flat)
    return {
        "record": dataclasses.asdict(record),
        "weights": weights,
        "calls": len(stand_in.CALLS) - calls,
        "micro_batches": engine.num_micro_batches * NUM_STEPS,
        "with_main_grad": with_main_grad,
        "left_in_accumulators": left,
    }


def digest(tensor: torch.Tensor) -> str:
    """Of the bits."""
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def main(out: Path, rank: int, size: int, port: int) -> None:
    """Three runs on tensor-parallel ranks."""
    with Worlds(rank, size, port).layout(2, 1, size // 2) as layout:
        assert layout is not None
        found = {
            "plain": run(layout, fused=False, recompute=False),
            "fused": run(layout, fused=True, recompute=False),
            "fused and recomputed": run(layout, fused=True, recompute=True),
        }
    (out / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *(int(text) for text in sys.argv[2:]))
