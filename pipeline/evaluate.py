"""Held-out figures: bits per subpixel and text perplexity, one order at a time, with fixed noise; and `jetway eval`."""

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.loader import apply_overrides, build_config, to_dict
from model.batch import Batch
from model.layers import layer_specs
from model.stats import METRICS, summarise
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.weights import load_weights, run_config_of
from pipeline.config import RunConfig
from pipeline.data.loader import EvalLoader
from pipeline.engine import build_stage, check_forced_kernels
from pipeline.parallel.agreement import joined, open_dataset_together, together
from pipeline.parallel.environment import ProcessEnvironment
from pipeline.parallel.layout import Layout
from pipeline.parallel.partition import cut_layers
from pipeline.parallel.stage import PipelineStage
from pipeline.scoring import Scorer, sum_over_world
from pipeline.tracker import EVAL
from pipeline.trained import TOKENIZER_FILE, portable_kernels, run_folder

logger = logging.getLogger(__name__)


def evaluate(stage: PipelineStage, layout: Layout, loader: EvalLoader, *, progress: bool = False) -> dict[str, Any]:
    """Scores every held-out example in each order that the model is trained in. Collective over all ranks.

    Images are scored given their caption (text first) and alone (image first); captions given their image and alone. No RGB
    noise, no input noise, no dropout, no dropped prefix; dequantisation noise is a function of eval.seed and the example.

    Args:
        loader: this data-parallel rank's share.

    Returns:
        On every rank: `image_bits` and `image_bits_unconditional` in bits per subpixel, `text_nats` and
        `text_nats_unconditional` per token with their `..._perplexity`, the flow's and mixture's figures, `num_examples`.
    """
    scorer, config = Scorer(stage, layout), loader.config
    sums = torch.zeros(2, len(METRICS), dtype=torch.float64, device=layout.device)
    orders = trained_orders(config)
    num_examples = 0
    with tqdm(total=len(loader) * len(orders), desc="evaluating", unit="batch", disable=not progress, leave=False) as bar:
        for batch in loader:
            num_examples += len(batch)
            for text_first in orders:
                sums += scorer.score(in_order(batch, text_first=text_first))
                bar.update()
    means = summarise(sum_over_world(sums))
    means.pop("loss", None)  # of a batch that scores everything it is no loss that anything is trained on
    for name in ("text_nats", "text_nats_unconditional"):
        if name in means:
            means[name.replace("nats", "perplexity")] = math.exp(min(means[name], 700.0))
    return {**means, "num_examples": loader.num_examples}


def trained_orders(config: RunConfig) -> tuple[bool, ...]:
    """Values of `text_first` that occur in training."""
    probability = config.model.objective.text_first_probability
    return tuple(order for order, share in ((True, probability), (False, 1.0 - probability)) if share > 0)


def in_order(batch: Batch, *, text_first: bool) -> Batch:
    """The same examples, all in one order and with everything scored."""
    return dataclasses.replace(
        batch,
        text_first=torch.full_like(batch.text_first, text_first),
        num_text_first=len(batch) if text_first else 0,
        drop_prefix=torch.zeros_like(batch.drop_prefix),
        score_all=True,
        log_stats=True,
    )


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway eval`."""
    arguments = _parser().parse_intermixed_args(argv)
    environment = ProcessEnvironment.detect()
    config = _run_config(arguments.source, arguments.overrides)
    if arguments.dry_run:
        if environment.rank == 0:
            print(json.dumps({"source": arguments.source, "data": to_dict(config)["data"], "eval": to_dict(config)["eval"]}, indent=1))
        return 0
    with joined(config, environment) as layout:
        _evaluate_checkpoint(arguments, config, layout)
    return 0


def _evaluate_checkpoint(arguments: argparse.Namespace, config: RunConfig, layout: Layout) -> None:
    """Scores the checkpoint on every rank; rank 0 prints the record and appends it to the run's eval.jsonl."""
    start = time.perf_counter()
    together(layout, lambda: check_forced_kernels(config, layout))
    with together(layout, lambda: open_checkpoint(arguments.source, group=layout.control_group)) as reader:
        dataset = open_dataset_together(layout, config.data.path, config.data.generation)
        if config.data.text == "caption":
            together(layout, lambda: dataset.check_tokenizer(run_folder(reader) / TOKENIZER_FILE, otherwise="evaluate on another one"))
        specs = layer_specs(config.model, layout.tensor_parallel, config.kernels)
        stage = build_stage(config, layout, specs, cut_layers([spec.training_flops for spec in specs], layout.pipe))
        together(layout, lambda: load_weights(reader, stage, ema=arguments.ema, config=config.model, partial=layout.pipe > 1))
        step, folder, origin = reader.step, run_folder(reader), str(reader.path)
    if config.parallel.precision == "bf16":
        for parameter in stage.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    stage.to(layout.device)
    loader = together(layout, lambda: EvalLoader(config, dataset, dp_rank=layout.data_rank, dp_degree=layout.data, needs_image=layout.is_first_stage))
    with loader:
        figures = evaluate(stage, layout, loader, progress=layout.is_main)
    record = {
        "step": step,
        **figures,
        "split": config.data.eval_split,
        "generation": dataset.manifest.generation,
        "takedown": dataset.tombstones.number,
        "eval_seed": config.eval.seed,
        "weights": "ema" if arguments.ema else "raw",
        "precision": config.parallel.precision,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if layout.is_main:
        with (folder / EVAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{origin}: {summary_line(record)}\n{json.dumps(record, indent=1)}")


def summary_line(record: dict[str, Any]) -> str:
    """The figures of one evaluation for people."""
    parts = [f"{record['num_examples']} held-out examples"]
    for name, text in (
        ("image_bits", "image given text {:.4f} bits per subpixel"),
        ("image_bits_unconditional", "image alone {:.4f}"),
        ("text_nats", "text given image {:.4f} nats per token"),
        ("text_perplexity", "perplexity {:.3f}"),
        ("text_nats_unconditional", "text alone {:.4f}"),
    ):
        if name in record:
            parts.append(text.format(record[name]))
    return ", ".join(parts)


def _run_config(source: Path | str, overrides: Sequence[str]) -> RunConfig:
    """The configuration stored in the checkpoint, on one process and with this machine's kernels unless the overrides say otherwise."""
    with open_checkpoint(source, verify=False) as reader:
        config = run_config_of(reader)
    values = to_dict(dataclasses.replace(config, kernels=portable_kernels(config.kernels)))
    values["parallel"].update(tensor=1, pipeline=1, data=None, processes=1, recompute="none")
    values["device"] = "auto" if values["device"] == "cuda" else values["device"]
    return build_config(RunConfig, apply_overrides(values, overrides), source=f"the configuration stored in {source} with the overrides")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway eval",
        description="Bits per subpixel and text perplexity on held-out samples, per order, with fixed noise. Appends to the run's eval.jsonl. "
        "Also runs under torchrun and srun: by default data-parallel, otherwise as parallel.tensor=... and parallel.pipeline=... say.",
        epilog="example: jetway eval runs/digits eval.num_examples=500",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest good checkpoint) or one checkpoint")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those stored, e.g. data.path=..., eval.batch_size=16")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument("--dry-run", action="store_true", help="print what would be evaluated; write nothing")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
