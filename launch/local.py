"""`jetway train CONFIG [key=value ...]`: starts the processes of a run on this machine.

The configuration is checked before anything starts and without torch, so that a mistake costs no time.
Under torchrun and srun, or with one process, the run happens in this very process: the same command serves everywhere.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.loader import load_config, to_yaml
from launch.processes import run_workers
from pipeline.config import RunConfig
from pipeline.parallel.environment import ProcessEnvironment


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway train`; returns the exit code of the run."""
    arguments = _parser().parse_intermixed_args(argv)
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    environment = ProcessEnvironment.detect()
    # A process of torchrun, of a multi-task srun step or of `run_workers` has nothing left to start, even in a world of one.
    inside = "RANK" in os.environ or environment.launcher != "single"
    world_size = environment.world_size if inside else config.parallel.processes
    _check_layout(config, world_size)
    if arguments.dry_run:
        if environment.rank == 0:
            print(describe(config, world_size))
        return 0
    if inside or world_size == 1:
        from pipeline.train import main as train

        return train([arguments.config, *arguments.overrides])
    command = [sys.executable, "-m", "launch.cli", "train", arguments.config, *arguments.overrides]
    return run_workers(command, num_processes=world_size, log_dir=Path(config.output_dir) / "logs")


def describe(config: RunConfig, world_size: int) -> str:
    """What `--dry-run` prints: the resolved configuration, the layout, and the cost of each pipeline stage."""
    micro, num_micro = config.micro_batches(world_size)
    parallel = config.parallel
    lines = [
        to_yaml(config).rstrip(),
        "---",
        f"output       {config.output_dir}",
        f"processes    {world_size} = {parallel.tensor} tensor x {parallel.pipeline} pipeline x {config.data_parallel_degree(world_size)} data",
        f"step         {config.data.global_batch_size} examples = {num_micro} micro-batch(es) of {micro} on each data-parallel rank",
    ]
    return "\n".join([*lines, *_cost_lines(config)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway train",
        description="Train, or continue training, the run that a configuration describes. "
        "Continues from the newest good checkpoint in the run's output_dir; Ctrl-C or SIGTERM saves one and stops.",
        epilog="example: jetway train train/digits output_dir=runs/mine optimizer.learning_rate=1e-3",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped configuration such as train/digits")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the file, e.g. parallel.processes=4")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, layout, parameters and FLOPs; start and write nothing")
    return parser


def _check_layout(config: RunConfig, world_size: int) -> None:
    try:
        config.micro_batches(world_size)
    except ValueError as error:
        fix = "change the number of processes, parallel.tensor, parallel.pipeline, data.global_batch_size or data.micro_batch_size"
        raise UserError("the processes do not fit the configuration", got=error, fix=fix) from None


def _cost_lines(config: RunConfig) -> list[str]:
    """Parameters and FLOPs from the configuration alone; the stages from the layer list that the engine will cut."""
    from model.flops import count_parameters, forward_flops, training_flops

    counts = count_parameters(config.model)
    lines = [
        f"parameters   {counts.total:,} = {counts.transformer:,} transformer + {counts.flow:,} flow",
        f"FLOPs        {forward_flops(config.model) / 1e9:,.3g} G forward, {training_flops(config.model) / 1e9:,.3g} G per training example",
        f"whole run    {training_flops(config.model) * config.data.global_batch_size * config.total_steps:.3g} FLOPs, recomputation not counted",
    ]
    if config.parallel.pipeline == 1:
        return lines
    from model.layers import layer_specs
    from pipeline.parallel.partition import cut_layers, stage_costs

    specs = layer_specs(config.model)
    costs = [spec.training_flops for spec in specs]
    bounds = cut_layers(costs, config.parallel.pipeline)
    for stage, cost in enumerate(stage_costs(costs, bounds)):
        first, last = specs[bounds[stage]].name, specs[bounds[stage + 1] - 1].name
        lines.append(f"stage {stage:<6} {first} .. {last}: {cost / sum(costs):.1%} of the FLOPs")
    return lines
