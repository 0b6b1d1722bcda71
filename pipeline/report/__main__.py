"""`python -m pipeline.report RUN_DIR` writes RUN_DIR/report.html and prints its path."""

import argparse
import sys
from collections.abc import Sequence

from configs.errors import UserError
from pipeline.report.build import build_report


def main(argv: Sequence[str]) -> int:
    """Builds the report of one run; 2 on a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description="Write report.html of a run.")
    parser.add_argument("run_dir", help="the run's output_dir")
    try:
        print(build_report(parser.parse_args(argv).run_dir))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
