"""`jetway demo`: the whole way on this machine, as a list of commands that you could type yourself.

Scanned digits as a folder of images -> data set -> training, stopped half-way and resumed -> evaluation, generated digits, captions.
Each figure at the end is computed from what those commands wrote, on held-out digits that the model never saw.
"""

import argparse
import base64
import contextlib
import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.loader import load_config
from pipeline.config import RunConfig

CONFIG = "train/digits"
NUM_IMAGES_PER_DIGIT = 20
NUM_CAPTIONS_SHOWN = 10
MARKER = ".jetway-demo"
"""File that says a folder was made by the demo, and may be made anew."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the demo keeps what it makes: `root` is the training run's folder, and the rest lies in it."""

    root: Path

    @property
    def digits(self) -> Path:
        """The digits as a user's folder: PNG files with captions beside them."""
        return self.root / "digits"

    @property
    def data(self) -> Path:
        """The prepared data set."""
        return self.root / "data"

    @property
    def prompts(self) -> Path:
        """One prompt a line."""
        return self.root / "prompts.txt"

    @property
    def generated(self) -> Path:
        """Images drawn from the prompts, one by one; beside it, `generated.png` shows all."""
        return self.root / "generated"

    @property
    def heldout(self) -> Path:
        """Held-out digits as image files, without captions."""
        return self.root / "heldout"

    @property
    def written(self) -> Path:
        """The captions that the model wrote for them."""
        return self.root / "heldout_captions.jsonl"

    @property
    def summary(self) -> Path:
        """The figures, shown at the top of the report too."""
        return self.root / "summary.json"


class Demo:
    """The commands of the demo, in order."""

    def __init__(self, places: Places, overrides: Sequence[str]) -> None:
        """`overrides` go to `jetway train`.

        Raises:
            UserError: they do not fit the configuration, or move what the demo has its own place for.
        """
        for override in overrides:
            if override.partition("=")[0] in ("data.path", "output_dir"):
                raise UserError("the demo keeps everything in one folder", got=override, fix="name that folder with --output")
        self.places = places
        self.overrides = [f"data.path={places.data}", f"output_dir={places.root}", *overrides]
        self.config = load_config(RunConfig, CONFIG, self.overrides)

    def prep(self) -> list[str]:
        """Folder of images and captions -> data set."""
        return ["jetway", "prep", "data/digits", "--embedded", "digits", "--input", str(self.places.digits), "--output", str(self.places.data)]

    def fit_tokenizer(self) -> None:
        """Takes the vocabulary from the data set, should another release of SentencePiece have made another number of pieces."""
        from data_prep.schema import Manifest
        from data_prep.storage import open_storage

        num_pieces = Manifest.load(open_storage(self.places.data)).tokenizer.num_pieces
        if num_pieces != self.config.model.text.num_pieces:
            self.overrides.append(f"model.text.num_pieces={num_pieces}")

    def train(self) -> list[str]:
        """Trains from the start, or from the newest checkpoint."""
        return ["jetway", "train", CONFIG, *self.overrides]

    def evaluate(self) -> list[str]:
        """Bits per subpixel on the held-out split."""
        return ["jetway", "eval", str(self.places.root)]

    def sample(self) -> list[str]:
        """Draws an image for each prompt."""
        files = ["--output", f"{self.places.generated}.png", "--save-images", str(self.places.generated)]
        return ["jetway", "sample", str(self.places.root), "--prompts-file", str(self.places.prompts), *files]

    def caption(self) -> list[str]:
        """Writes a caption for each held-out image."""
        return ["jetway", "caption", str(self.places.root), str(self.places.heldout), "--output", str(self.places.written)]

    def report(self) -> list[str]:
        """Puts everything on one page."""
        return ["python", "-m", "pipeline.report", str(self.places.root)]


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway demo`."""
    arguments = _parser().parse_intermixed_args(argv)
    places = Places(Path(arguments.output))
    demo = Demo(places, arguments.overrides)
    if arguments.dry_run:
        for command in (demo.prep(), demo.train(), demo.train(), demo.evaluate(), demo.sample(), demo.caption(), demo.report()):
            print(f"$ {shlex.join(command)}")
        return 0
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a training run in progress is ended too
    _claim(places.root)

    _title("1. A folder of scanned digits with captions becomes a data set")
    _run(demo.prep())
    demo.fit_tokenizer()
    _title(f"2. Train on {demo.config.parallel.processes} processes; stop half-way, as a scheduler would, with SIGTERM")
    _run_until_step(demo.train(), demo.config.total_steps // 2, places.root / "metrics.jsonl")
    _title("3. The same command again: it resumes from its checkpoint")
    _run(demo.train())
    _title("4. Evaluate on held-out digits")
    _run(demo.evaluate())
    _title("5. Draw digits from prompts")
    asked = _write_prompts(places.prompts)
    _run(demo.sample())
    _title("6. Caption held-out digits")
    labels = _write_heldout(places.data, places.heldout)
    _run(demo.caption(), num_lines=NUM_CAPTIONS_SHOWN)

    _title("7. Figures and report")
    summary = summarise(places, asked, labels, wall_seconds=time.perf_counter() - started)
    places.summary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _add_captions_to_report(places, labels, demo.config.total_steps)
    _run(demo.report())
    print(_figures(summary, places))
    return 0


def summarise(places: Places, asked: Sequence[int], labels: dict[str, int], *, wall_seconds: float) -> dict[str, Any]:
    """The figures of summary.json, from the files that the commands wrote."""
    import numpy as np

    from data_prep.embedded.digits_scorer import train_scorer
    from pipeline.provenance import git_revision

    scorer = train_scorer(str(places.data))
    captions = _records(places.written)
    training = [record["images_per_second"] for record in _records(places.root / "metrics.jsonl")]
    return {
        "generated_digit_accuracy": scorer.accuracy(_read_samples(places.generated, len(asked)), np.array(asked)),
        "caption_accuracy": _caption_accuracy(captions, labels),
        "bits_per_subpixel": _records(places.root / "eval.jsonl")[-1]["image_bits"],
        "images_per_second": statistics.median(training),
        "wall_seconds": wall_seconds,
        "git_revision": git_revision()["revision"],
        "num_generated": len(asked),
        "num_captioned": len(labels),
        "judge_accuracy_on_real_digits": scorer.heldout_accuracy,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jetway demo",
        description="Train a small JetFormer on scanned digits, from a folder of images to figures and a report. "
        "A folder that an earlier demo made is made anew; any other is left alone.",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=f"values that replace those of {CONFIG}, e.g. total_steps=300")
    parser.add_argument("--output", default="runs/demo", help="folder to make (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    return parser


def _claim(root: Path) -> None:
    """An empty folder of ours at `root`."""
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).is_file():
            raise UserError(f"{root} holds other files", expected="a folder that the demo made, or none", fix="choose another with --output")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).write_text("Made by `jetway demo`, and made anew by the next one.\n", encoding="utf-8")


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _run(command: Sequence[str], *, num_lines: int | None = None) -> None:
    """Runs one command in a process of its own, shown as it would be typed; of its output, the first `num_lines` if that is given."""
    with _running(command, stdout=None if num_lines is None else subprocess.PIPE) as process:
        if process.stdout is not None:
            lines = [line.decode() for line in process.stdout]
            print("".join(lines[:num_lines]) + (f"... and {len(lines) - num_lines} more\n" if num_lines and len(lines) > num_lines else ""), end="")


def _run_until_step(command: Sequence[str], step: int, metrics: Path) -> None:
    """Runs `jetway train` and sends it SIGTERM once the log shows `step`."""
    with _running(command) as process:
        while process.poll() is None:
            records = _records(metrics)
            if records and records[-1]["step"] >= step:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.5)


@contextlib.contextmanager
def _running(command: Sequence[str], stdout: int | None = None) -> "Iterator[subprocess.Popen[bytes]]":
    """A command's process. It is waited for, and ended in good order if the demo itself is.

    Raises:
        UserError: it failed.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    program, *arguments = command
    # This very interpreter and installation, whatever PATH holds.
    executable = [sys.executable, "-m", "launch.cli"] if program == "jetway" else [sys.executable]
    process = subprocess.Popen([*executable, *arguments], stdout=stdout)
    try:
        yield process
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code != 0:
        raise UserError(f"the demo stopped: `{' '.join(command[:2])}` ended with exit code {code}", fix="its own message is above")


def _write_prompts(path: Path) -> list[int]:
    """Writes the same number of prompts for each digit, in several wordings; returns the digit of each line."""
    from data_prep.embedded.digits import prompts

    asked, lines = [], []
    for digit in range(10):
        wordings = prompts(digit)
        for number in range(NUM_IMAGES_PER_DIGIT):
            asked.append(digit)
            lines.append(wordings[number % len(wordings)])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return asked


def _write_heldout(data: Path, folder: Path) -> dict[str, int]:
    """Writes the held-out digits as PNG files without captions; returns the digit of each file name."""
    from PIL import Image

    from data_prep.embedded.digits_scorer import load_split

    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for number, (image, label) in enumerate(zip(*load_split(str(data), "heldout"), strict=True)):
        name = f"{number:04d}.png"
        Image.fromarray(image).save(folder / name)
        labels[name] = int(label)
    return labels


def _read_samples(folder: Path, count: int) -> Any:
    """The generated images, uint8 [N, H, W], in the order of the prompts."""
    import numpy as np
    from PIL import Image

    return np.stack([np.asarray(Image.open(folder / f"{number:05d}.png")) for number in range(count)])


def _caption_accuracy(captions: Sequence[dict[str, Any]], labels: dict[str, int]) -> float:
    """Share of held-out images whose caption names their digit and no other."""
    from data_prep.embedded.digits import parse_digit

    said = {Path(caption["file"]).name: parse_digit(caption["caption"]) for caption in captions}
    return sum(said.get(name) == digit for name, digit in labels.items()) / len(labels)


def _add_captions_to_report(places: Places, labels: dict[str, int], step: int) -> None:
    """Appends them to the run's captions.jsonl in the form that the report shows: picture, text, right or wrong."""
    from data_prep.embedded.digits import parse_digit

    with (places.root / "captions.jsonl").open("a", encoding="utf-8") as file:
        for record in _records(places.written):
            name = Path(record["file"]).name
            picture = base64.b64encode((places.heldout / name).read_bytes()).decode()
            shown = {"key": name, "image": picture, "caption": record["caption"], "reference": str(labels[name])}
            file.write(json.dumps({"step": step, **shown, "correct": parse_digit(record["caption"]) == labels[name]}) + "\n")


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; [] while there is none."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _figures(summary: dict[str, Any], places: Places) -> str:
    return "\n".join(
        [
            f"generated digits that show the digit asked for   {summary['generated_digit_accuracy']:.1%} of {summary['num_generated']}"
            f"   (the judge, an SVM, reads {summary['judge_accuracy_on_real_digits']:.1%} of real held-out digits)",
            f"captions of held-out digits that are right       {summary['caption_accuracy']:.1%} of {summary['num_captioned']}",
            f"bits per subpixel of held-out digits             {summary['bits_per_subpixel']:.2f}",
            f"training speed                                   {summary['images_per_second']:.0f} images/s",
            f"whole demo                                       {summary['wall_seconds'] / 60:.1f} minutes",
            f"these figures: {places.summary}",
            f"report:        {places.root / 'report.html'}",
        ]
    )
