"""One prepared data set of digits, and the command line as a user has it: real processes in a folder of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Jetway = Callable[..., "subprocess.CompletedProcess[str]"]

TINY = (
    *("model.flow.depth=2", "model.flow.width=16", "model.decoder.depth=2", "model.decoder.width=32", "model.decoder.mlp_dim=64"),
    *("model.decoder.head_dim=8", "model.gmm.num_mixtures=4", "data.global_batch_size=16", "total_steps=24", "log.every_steps=1"),
    *("checkpoint.every_steps=8", "checkpoint.keep_last=3", "eval.every_steps=0", "eval.sample_every_steps=0", "eval.num_examples=16"),
    *("eval.num_samples=4", "log.peak_tflops=0.1"),
)
"""Overrides of train/digits for a run of seconds."""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that all commands of this session run in."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="session")
def jetway(workspace: Path) -> Jetway:
    """Runs one `jetway` command to its end."""

    def run(*arguments: str, timeout_s: float = 240.0) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "launch.cli", *arguments]
        return subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=timeout_s, check=False)

    return run


@pytest.fixture(scope="session")
def digits(jetway: Jetway, workspace: Path) -> str:
    """The digits as a data set, made by `jetway prep`; returns its path."""
    done = jetway("prep", "data/digits", "--embedded", "digits", "--input", "raw", "--output", "digits")
    assert done.returncode == 0, done.stderr
    return "digits"
