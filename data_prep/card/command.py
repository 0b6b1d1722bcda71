"""`jetway card`: one offline HTML page that shows a data set to people."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from data_prep.schema import Manifest
from data_prep.storage import open_storage
from data_prep.units import bytes_text


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway card`."""
    parser = argparse.ArgumentParser(
        prog="jetway card",
        description="Write a data-set card: one HTML file that needs no network, with samples, distributions, losses and history.",
    )
    parser.add_argument("data_set", metavar="DATASET", help="folder or s3:// prefix")
    parser.add_argument("--output", type=Path, default=Path("card.html"), help="the file to write (default %(default)s)")
    parser.add_argument("--generation", type=int, metavar="N", help="describe this generation (default: the newest)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="pictures of the contact sheet, 0 for none (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read and written; write nothing")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.samples <= 2000:
        raise UserError("--samples must be in 0..2000", got=arguments.samples)
    storage = open_storage(arguments.data_set)
    manifest = Manifest.load(storage, arguments.generation)
    if arguments.dry_run:
        total = sum(split.num_samples for split in manifest.splits.values())
        print(f"would describe generation {manifest.generation} of {arguments.data_set} ({total:,} samples) in {arguments.output}")
        return 0
    # Imported here: Pillow, numpy and the tokenizer are not needed to say what is wrong with the arguments.
    from data_prep.card.build import build_card
    from data_prep.card.gather import gather

    data = build_card(gather(storage, arguments.generation, arguments.samples))
    open_storage(arguments.output.parent).put_bytes(arguments.output.name, data)
    print(f"{arguments.output}: generation {manifest.generation} of {arguments.data_set}, {bytes_text(len(data))}; open it in a browser")
    return 0
