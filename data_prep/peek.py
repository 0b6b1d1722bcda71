"""`jetway peek`: look at samples of a data set, as a contact sheet and as text."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from configs.errors import UserError
from data_prep.samples import StoredSample, num_usable, stored_samples
from data_prep.schema import SPLITS, Manifest
from data_prep.storage import open_storage
from data_prep.tombstones import load

CELL = 160
"""Width of one cell of the sheet in pixels, and height of its picture."""
CAPTION_LINES, LINE_HEIGHT = 4, 13


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway peek`."""
    parser = argparse.ArgumentParser(prog="jetway peek", description="Show samples of a data set: a contact sheet (PNG) and a listing.")
    parser.add_argument("data_set", metavar="DATASET", help="folder or s3:// prefix")
    parser.add_argument("--generation", type=int, help="manifest generation (default: the newest)")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=24, help="samples, spread evenly over the split (default %(default)s)")
    parser.add_argument("--start", type=int, help="show consecutive samples from this one on instead")
    parser.add_argument("--output", type=Path, default=Path("peek.png"), help="the PNG to write (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list the samples; write no sheet")
    arguments = parser.parse_args(argv)
    if arguments.count < 1 or (arguments.start or 0) < 0:
        raise UserError("--count must be at least 1 and --start at least 0", got=f"{arguments.count}, {arguments.start}")
    storage = open_storage(arguments.data_set)
    manifest, tombstones = Manifest.load(storage, arguments.generation), load(storage)
    total = num_usable(manifest, arguments.split, tombstones)
    if total <= (arguments.start or 0):
        without = "" if total == manifest.splits[arguments.split].num_samples else " that were not taken down"
        raise UserError(f"the {arguments.split} split of {arguments.data_set} has {total} samples{without}", got=f"--start {arguments.start or 0}")
    every = max(1, total // arguments.count) if arguments.start is None else 1
    chosen = []
    for sample in stored_samples(storage, manifest, arguments.split, every=every, start=arguments.start or 0, tombstones=tombstones):
        chosen.append(sample)
        if len(chosen) == arguments.count:
            break
    for sample in chosen:
        values = sample.values
        label = f"  label {values['label']}" if "label" in values else ""
        origin = f"{values['source']} {values['width']}x{values['height']} {values['format']}"
        print(f"{sample.shard} {sample.key}  {sample.caption!r}{label}  [{origin}]")
    if arguments.dry_run:
        print(f"would write {arguments.output}")
        return 0
    buffer = io.BytesIO()
    contact_sheet(chosen).save(buffer, "PNG")
    open_storage(arguments.output.parent).put_bytes(arguments.output.name, buffer.getvalue())
    print(f"{arguments.output}: {len(chosen)} of {total:,} {arguments.split} samples")
    return 0


def contact_sheet(samples: Sequence[StoredSample], columns: int = 6) -> Image.Image:
    """Pictures in a grid, captions below them; small pictures are enlarged without smoothing."""
    columns = min(columns, len(samples))
    row = CELL + CAPTION_LINES * LINE_HEIGHT + 8
    sheet = Image.new("RGB", (columns * (CELL + 8) + 8, -(-len(samples) // columns) * row + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, sample in enumerate(samples):
        left, top = 8 + number % columns * (CELL + 8), 8 + number // columns * row
        with Image.open(io.BytesIO(sample.image)) as opened:
            longer = max(opened.size)
            method = Image.Resampling.NEAREST if longer <= CELL else Image.Resampling.LANCZOS
            width, height = (max(1, round(side * CELL / longer)) for side in opened.size)
            sheet.paste(opened.convert("RGB").resize((width, height), method), (left + (CELL - width) // 2, top + (CELL - height) // 2))
        for line, text in enumerate(_wrap(sample.caption, draw, font)):
            draw.text((left, top + CELL + 2 + line * LINE_HEIGHT), text, fill="black", font=font)
    return sheet


def _wrap(caption: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The caption in at most `CAPTION_LINES` lines of `CELL` pixels; the rest becomes an ellipsis."""

    def fits(text: str) -> bool:
        # The bundled font is Latin only when Pillow lacks FreeType; what it cannot draw must not stop the sheet.
        return draw.textlength(text, font=font) <= CELL

    lines = [""]
    for word in caption.encode("latin-1", "replace").decode("latin-1").split():
        if fits(f"{lines[-1]} {word}".strip()):
            lines[-1] = f"{lines[-1]} {word}".strip()
        elif len(lines) == CAPTION_LINES:
            lines[-1] += "..."
            break
        else:
            while not fits(word):
                word = word[:-1]
            lines.append(word)
    return [line for line in lines if line]
