"""From raw images to captions by the command line, with a run that is killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from configs.loader import load_config
from pipeline.config import RunConfig
from tests.end_to_end.conftest import TINY, Jetway

NUM_STEPS = load_config(RunConfig, "train/digits", TINY).total_steps

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def train_command(data: str, run: str, *more: str) -> list[str]:
    return ["train", "train/digits", f"data.path={data}", f"output_dir={run}", *TINY, *more]


def records(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def last_step(run: Path) -> int:
    found = records(run / "metrics.jsonl")
    return int(found[-1]["step"]) if found else 0


def workers_of(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def start_and_wait_for_step(workspace: Path, command: list[str], step: int) -> "subprocess.Popen[bytes]":
    run = workspace / next(word.removeprefix("output_dir=") for word in command if word.startswith("output_dir="))
    process = subprocess.Popen([sys.executable, "-m", "launch.cli", *command], cwd=workspace, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while last_step(run) < step:
        assert process.poll() is None, "training ended too early"
        assert time.monotonic() < deadline, "training did not get that far"
        time.sleep(0.05)
    return process


@pytest.fixture(scope="module")
def whole_run(jetway: Jetway, digits: str, workspace: Path) -> Path:
    """A run that nobody disturbs, on two processes."""
    done = jetway(*train_command(digits, "whole"))
    assert done.returncode == 0, done.stderr
    return workspace / "whole"


@pytest.fixture(scope="module")
def killed_run(jetway: Jetway, digits: str, workspace: Path) -> Path:
    """The same run, one of its ranks killed by SIGKILL after the first checkpoint, then started again by the same command."""
    command = train_command(digits, "killed")
    process = start_and_wait_for_step(workspace, command, 10)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    reached = last_step(workspace / "killed")
    assert 10 <= reached < NUM_STEPS
    done = jetway(*command)
    assert done.returncode == 0, done.stderr
    assert "resum" in (done.stdout + done.stderr).lower()
    return workspace / "killed"


def test_killed_run_ends_with_the_same_losses(whole_run: Path, killed_run: Path) -> None:
    """Bit for bit on the same layout: data, noise, weights, moments and schedule all continue."""
    whole, killed = records(whole_run / "metrics.jsonl"), records(killed_run / "metrics.jsonl")
    assert [record["step"] for record in killed] == [record["step"] for record in whole] == list(range(1, NUM_STEPS + 1))
    assert [record["loss"] for record in killed] == [record["loss"] for record in whole]
    assert [record["grad_norm"] for record in killed] == [record["grad_norm"] for record in whole]


def test_terminated_run_continues_exactly_and_on_another_layout_to_rounding(jetway: Jetway, digits: str, whole_run: Path, workspace: Path) -> None:
    """SIGTERM saves. Two processes then end bit for bit as the undisturbed run; one process reads the same checkpoint directly."""
    command = train_command(digits, "stopped", "checkpoint.every_steps=1000")
    process = start_and_wait_for_step(workspace, command, 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert last_step(workspace / "stopped") < NUM_STEPS
    shutil.copytree(workspace / "stopped", workspace / "moved")

    whole = [record["loss"] for record in records(whole_run / "metrics.jsonl")]
    done = jetway(*command)
    assert done.returncode == 0, done.stderr
    assert [record["loss"] for record in records(workspace / "stopped" / "metrics.jsonl")] == whole

    done = jetway(*train_command(digits, "moved", "parallel.processes=1"))
    assert done.returncode == 0, done.stderr
    assert "resum" in (done.stdout + done.stderr).lower()
    moved = [record["loss"] for record in records(workspace / "moved" / "metrics.jsonl")]
    assert moved == pytest.approx(whole, rel=1e-4)


def test_finished_run_has_its_report(whole_run: Path) -> None:
    page = (whole_run / "report.html").read_text()
    assert "Training loss" in page
    assert 'src="http' not in page  # self-contained


def test_evaluation_repeats_exactly(jetway: Jetway, whole_run: Path) -> None:
    first, second = jetway("eval", "whole"), jetway("eval", "whole")
    assert first.returncode == second.returncode == 0, first.stderr
    assert "bits" in first.stdout
    evaluations = records(whole_run / "eval.jsonl")
    assert evaluations[-1]["image_bits"] == evaluations[-2]["image_bits"]
    assert 0 < evaluations[-1]["image_bits"] < 12


def test_samples_and_captions_are_written(jetway: Jetway, whole_run: Path, workspace: Path) -> None:
    done = jetway("sample", "whole", "--prompt", "the digit 7", "--prompt", "a handwritten two", "--output", "grid.png", "--save-images", "drawn")
    assert done.returncode == 0, done.stderr
    assert Image.open(workspace / "drawn" / "00001.png").size == (8, 8)
    done = jetway("caption", "whole", "drawn", "--output", "captions.jsonl")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workspace / "captions.jsonl").read_text().splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["00000.png", "00001.png"]
    assert all(isinstance(line["caption"], str) for line in lines)
