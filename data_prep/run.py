"""`jetway prep`: the command line of `prepare`."""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from configs.errors import ConfigError, UserError
from configs.loader import load_config, to_yaml
from data_prep.config import PrepConfig
from data_prep.part import measure
from data_prep.plan import Plan, make_plan
from data_prep.prepare import growth, prepare, unfinished_plan
from data_prep.pricing import add_options, options_of, price
from data_prep.schema import Manifest, generations
from data_prep.shard import finished_parts
from data_prep.storage import open_storage

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway prep`."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.count < 1:
        raise UserError("--count must be at least 1", got=arguments.count)
    config = configure(arguments.settings, arguments.input, arguments.output)
    if arguments.dry_run:
        _print_plan(config, arguments.embedded)
        return 0
    if arguments.embedded:
        _write_embedded(arguments.embedded, Path(config.inputs[0]), arguments.count)
    if arguments.plan:
        found = price(config, partial(measure, config=config), options_of(arguments))
        print(found.to_json() if arguments.json else found.text())
        return 0
    manifest, worked = prepare(config, from_generation=arguments.from_generation)
    if not worked:
        print(f"{config.output} is finished (generation {manifest.generation}): nothing to do")
    print(summary(manifest))
    return 0


def configure(settings: Sequence[str], inputs: Sequence[str] | None, output: str | None) -> PrepConfig:
    """The configuration from `CONFIG? key=value...`, `--input` and `--output`; the flags win.

    Raises:
        UserError: no input, no output, an output inside an input, or a configuration that does not parse.
    """
    overrides = list(settings)
    path = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    config = load_config(PrepConfig, path, overrides)
    chosen = output or config.output
    config = replace(
        config,
        inputs=tuple(text if "://" in text else os.path.normpath(text) for text in inputs or config.inputs),
        output=chosen if not chosen or "://" in chosen else os.path.normpath(chosen),
    )
    if not config.inputs:
        raise ConfigError("no input given", expected="--input PATH, or `inputs` in the configuration")
    if not config.output:
        raise ConfigError("no output given", expected="--output DIR, or `output` in the configuration")
    target = Path(config.output).absolute()
    for source in (Path(text).absolute() for text in config.inputs if "://" not in text):
        if "://" not in config.output and (target == source or source in target.parents):
            fix = "choose an output outside: it would become input itself"
            raise UserError(f"the output {config.output} lies inside the input {source}", fix=fix)
    for text in config.inputs:
        if "://" in text and f"{config.output.rstrip('/')}/".startswith(f"{text.rstrip('/')}/"):
            fix = "choose an output outside: it would become input itself"
            raise UserError(f"the output {config.output} lies inside the input {text}", fix=fix)
    return config


def summary(manifest: Manifest) -> str:
    """A few lines for people: splits, drops, tokenizer."""
    lines = []
    for name, split in manifest.splits.items():
        size = sum(shard.num_bytes for shard in split.shards)
        lines.append(f"{name:<10}{split.num_samples:>10,} samples in {len(split.shards):,} shards, {size / 2**20:,.1f} MiB")
    counts = manifest.counts
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in counts.dropped.items())
    why = f" ({reasons}; every one is listed in ledger/)" if reasons else ""
    lines.append(f"{'dropped':<10}{counts.read - counts.kept:>10,} of {counts.read:,}{why}")
    pieces, image = manifest.tokenizer.num_pieces, manifest.image
    lines.append(f"{'tokenizer':<10}{pieces:>10,} pieces (train with model.text.num_pieces={pieces})")
    shape = "on the shorter side" if image.resize_mode == "keep_ratio" else "square"
    lines.append(f"{'images':<10}{image.resolution:>10,} pixels {shape}, {image.channels} channels, {image.extension}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway prep",
        description="Prepare images and captions for training: shards, index, manifest and tokenizer.",
        epilog="Run the same command again after an interruption: finished work is kept and the result is the same, byte for byte.",
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key=value", help="a configuration file or the name of a shipped one, then overrides")
    parser.add_argument("--input", action="append", metavar="PATH", help="folder of images, table or tar; may be repeated (sets `inputs`)")
    parser.add_argument("--output", metavar="DIR", help="data set to write: a folder or s3:// prefix (sets `output`)")
    parser.add_argument("--embedded", choices=("digits", "shapes"), help="first write this embedded set to the input folder, unless it is there")
    parser.add_argument("--count", type=int, default=20_000, help="images of `--embedded shapes` (default %(default)s)")
    parser.add_argument("--from-generation", type=int, help="add what the inputs have gained to this generation (default: the newest)")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="--plan as one JSON object")
    parser.add_argument("--dry-run", action="store_true", help="list inputs and shards; write nothing")
    return parser


def _write_embedded(name: str, folder: Path, count: int) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder} is there already: the embedded set is not written again")
        return
    # Imported here: digits need scikit-learn, which ordinary data sets do not.
    if name == "digits":
        from data_prep.embedded import digits

        number = digits.write_folder(folder)
    else:
        from data_prep.embedded import shapes

        number = shapes.write_folder(folder, count)
    print(f"wrote {number:,} images with captions to {folder}")


def _print_plan(config: PrepConfig, embedded: str | None) -> None:
    if embedded and not Path(config.inputs[0]).exists():
        print(f"would first write the embedded set {embedded!r} to {config.inputs[0]}, then prepare it to {config.output}")
    else:
        storage = open_storage(config.output)
        plan = unfinished_plan(storage)
        if plan is None and generations(storage):
            plan = growth(config, storage, None, {})
        if plan is None and not generations(storage):
            plan = make_plan(config)
        _print_tasks(plan, config)
        state = f"generation {generations(storage)[-1]} is finished" if generations(storage) else "nothing is published yet"
        done = len(list(finished_parts(storage, plan.generation))) if plan else 0
        print(f"output  {config.output}: {state}{f', {done:,} tasks of the next are done' if done else ''}")
    print(f"nothing was written; the configuration:\n{to_yaml(config)}", end="")


def _print_tasks(plan: Plan | None, config: PrepConfig) -> None:
    if plan is None:
        print("input   nothing new")
        return
    samples: Counter[tuple[str, str]] = Counter()
    for part in (span.part for task in plan.tasks for span in task.spans):
        samples[part.kind, part.path] += len(part.rows) or part.count
    for (kind, path), number in list(samples.items())[:20]:
        print(f"input   {kind:<7} {path}: {number:,} samples")
    if len(samples) > 20:
        print(f"        and {len(samples) - 20:,} more inputs")
    num_shards = -(-plan.num_samples // config.samples_per_shard)
    print(f"tasks   {len(plan.tasks):,}, for about {num_shards:,} shards of {config.samples_per_shard:,} samples")
