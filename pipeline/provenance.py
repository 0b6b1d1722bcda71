"""What produced a run: source revision, versions, configuration hash and command, without names of hosts, users or folders."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from configs.loader import config_hash
from pipeline.config import RunConfig

PACKAGES = ("jetway", "torch", "deepspeed", "megatron-core", "numpy", "safetensors", "sentencepiece", "triton", "wandb")
"""Distributions whose versions are recorded, where installed."""


def git_revision() -> dict[str, Any]:
    """{"revision": commit or None, "dirty": whether tracked files differ from it}; None where the code is not run from a checkout."""
    folder = Path(__file__).resolve().parent
    # An installed copy may lie inside somebody else's repository: the revision counts only if this very file is tracked.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"revision": None, "dirty": None}
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"revision": _git(folder, "rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def library_versions() -> dict[str, str]:
    """Python and every installed package of PACKAGES."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"torch": str(torch.__version__)}  # of the wheels for CUDA the metadata does not say which


def provenance(config: RunConfig, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """A JSON-able record.

    Args:
        argv: the command line; None takes this process's. The program's own folder is left out.
    """
    command = list(sys.argv if argv is None else argv)
    return {
        "git": git_revision(),
        "versions": library_versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "config_hash": config_hash(config),
        "command": [Path(command[0]).name, *command[1:]] if command else [],
    }
