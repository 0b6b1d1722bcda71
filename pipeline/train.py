"""`python -m pipeline.train CONFIG [key=value ...]`: one process of a run, under torchrun, under srun, or alone.

Exit codes: 0 finished, or stopped by a signal with everything saved; 2 a user's mistake, or a loss that is not finite; 1 anything else.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from configs.errors import UserError
from configs.loader import load_config, to_yaml
from pipeline.config import RunConfig
from pipeline.parallel.agreement import SharedUserError, joined
from pipeline.parallel.environment import ProcessEnvironment
from pipeline.parallel.layout import Layout, check_layout
from pipeline.preemption import StopRequest
from pipeline.trainer import Trainer

logger = logging.getLogger(__name__)

EXIT_FAILURE, EXIT_USER_ERROR = 1, 2


def main(argv: Sequence[str]) -> int:
    """Trains, or continues, the run that a configuration describes.

    Raises:
        UserError: the configuration, layout, data or checkpoint does not fit; on rank 0 alone where all ranks found it together.
    """
    arguments = _parser().parse_intermixed_args(argv)
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    environment = ProcessEnvironment.detect()
    check_layout(config, environment.world_size)
    if arguments.dry_run:
        if environment.rank == 0:
            print(to_yaml(config).rstrip())
        return 0
    if environment.rank > 0:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        with StopRequest() as stop, joined(config, environment) as layout:
            _train(config, layout, stop)
    except SharedUserError:
        if environment.rank == 0:
            raise
        return EXIT_USER_ERROR
    return 0


def _train(config: RunConfig, layout: Layout, stop: StopRequest) -> None:
    try:
        Trainer(config, layout).run(stop)
    except SharedUserError:
        raise
    except BaseException as error:
        if layout.world_size == 1:
            raise
        _abort(layout, error)


def _abort(layout: Layout, error: BaseException) -> None:
    """Ends this process at once: the other ranks wait in some collective, and leaving in good order would wait for them.

    Whoever started the processes ends the others when one has failed.
    """
    if isinstance(error, UserError):
        print(f"jetway: rank {layout.rank}: {error}", file=sys.stderr)
    else:
        print(f"jetway: rank {layout.rank} failed", file=sys.stderr)
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train",
        description="One process of a training run; `jetway train` starts as many as the configuration says.",
        epilog="example: torchrun --nproc_per_node=8 -m pipeline.train train/image_text_350m data.path=s3://bucket/data",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped configuration such as train/digits")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the file")
    parser.add_argument("--dry-run", action="store_true", help="check configuration and layout, print the resolved configuration, write nothing")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as user_error:
        print(f"jetway: {user_error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
