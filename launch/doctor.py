"""`jetway doctor`: what is installed, what each optional part would add, what is wrong, and the command that mends it.

Libraries are imported in child processes: one that crashes on import is reported like any other, and torch never enters this process.
"""

import argparse
import importlib.metadata
import json
import netrc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

Status = Literal["ok", "absent", "note", "wrong"]

PROBE_TIMEOUT_S = 120
MIN_DISK_GIB = 5.0
MIN_SHARED_MEMORY_GIB = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    """`absent`: an optional part that is not there; `wrong`: something that is needed does not work."""
    detail: str
    adds: str = ""
    """What an optional part would bring."""
    fix: str = ""
    section: str = ""
    """Heading under which the report shows it; empty for the first, which has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A distribution, and the import that proves it usable."""

    distribution: str
    probe: str
    """Program that imports what Jetway uses of it; a line that it prints after `detail: ` joins the report."""
    required: bool = True
    adds: str = ""
    extra: str = ""
    """Extra of setup.py that installs it."""


_TORCH_PROBE = """
import torch
gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
print('detail:', ', '.join(gpus) if gpus else 'no GPU found' if torch.version.cuda else 'CPU build')
"""

LIBRARIES = (
    Library(distribution="torch", probe=_TORCH_PROBE),
    Library(distribution="deepspeed", probe="from deepspeed.runtime.pipe.engine import PipelineEngine"),
    Library(distribution="megatron-core", probe="from megatron.core.tensor_parallel import ColumnParallelLinear"),
    Library(distribution="ray", probe="import ray"),
    Library(distribution="webdataset", probe="import webdataset"),
    Library(distribution="sentencepiece", probe="import sentencepiece"),
    Library(distribution="safetensors", probe="import safetensors.numpy"),
    Library(distribution="pillow", probe="import PIL.Image"),
    Library(distribution="opencv-python-headless", probe="import cv2"),
    Library(distribution="simplejpeg", probe="import simplejpeg"),
    Library(distribution="xxhash", probe="import xxhash"),
    Library(distribution="pyarrow", probe="import pyarrow.parquet"),
    Library(distribution="fsspec", probe="import fsspec"),
    Library(distribution="aiohttp", probe="import aiohttp"),
    Library(distribution="aiodns", probe="import aiodns"),
    Library(distribution="protego", probe="import protego"),
    Library(distribution="pydantic", probe="import pydantic"),
    Library(distribution="wandb", probe="import wandb"),
    Library(distribution="s3fs", probe="import s3fs", required=False, adds="data sets and shards on S3 (s3://...)", extra="s3"),
    Library(distribution="obstore", probe="import obstore", required=False, adds="faster S3 than s3fs alone", extra="s3"),
    Library(distribution="py3langid", probe="import py3langid", required=False, adds="`filters.languages` of `jetway prep`", extra="language"),
    Library(
        distribution="scikit-learn", probe="import sklearn.datasets", required=False, adds="`jetway demo`: its digits and their judge", extra="demo"
    ),
    Library(distribution="triton", probe="import triton", required=False, adds="the fused GPU kernels of model/kernels", extra="gpu"),
    Library(distribution="liger-kernel", probe="import liger_kernel.ops.geglu", required=False, adds="its GeGLU kernel (kernels.geglu=liger)"),
)

_APEX_PROBE = "import torch, amp_C\nfrom apex.optimizers import FusedAdam\nimport fused_weight_gradient_mlp_cuda"
_APEX_BUILD = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex"

_KERNELS_PROBE = f"""
import dataclasses, json, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
import torch
from model.kernels.dispatch import explain
device = 'cuda' if torch.cuda.is_available() else 'cpu'
print('detail:', json.dumps([device, [dataclasses.asdict(choice) for choice in explain(device, torch.bfloat16)]]))
"""


def main(argv: Sequence[str]) -> int:
    """Entry point of `jetway doctor`: 0 when all that is required works, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="jetway doctor", description="Report what is installed, what is optional and what is wrong.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--dry-run", action="store_true", help="name the checks and run none")
    parser.add_argument("--output-dir", default=".", help="folder whose disk is looked at (default: the current one)")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        print(
            "\n".join(
                [
                    "python",
                    *(library.distribution for library in LIBRARIES),
                    "apex",
                    "gpu driver",
                    "wandb login",
                    "disk",
                    "shared memory",
                    "cpu",
                    "git",
                    "kernels",
                ]
            )
        )
        return 0
    findings = examine(Path(arguments.output_dir))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(_report(findings))
    return int(any(finding.status == "wrong" for finding in findings))


def examine(folder: Path) -> list[Finding]:
    """All findings, in the order of the report; `folder` is where runs would be written."""
    specifiers = _required_versions()
    checks: list[Callable[[], Finding | list[Finding]]] = [
        _python,
        *(lambda library=library: examine_library(library, specifiers.get(library.distribution)) for library in LIBRARIES),
        _apex,
        _gpu_driver,
        _wandb_login,
        lambda: _disk(folder),
        _shared_memory,
        _cpu,
        _git,
        _kernels,
    ]
    findings: list[Finding] = []
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        for found in pool.map(lambda check: check(), checks):
            findings += found if isinstance(found, list) else [found]
    return findings


def examine_library(library: Library, requirement: Requirement | None) -> Finding:
    """Version against setup.py, then a real import in a child process."""
    missing: Status = "wrong" if library.required else "absent"
    install = f"pip install -e '.[{library.extra}]'" if library.extra else f"pip install '{requirement or library.distribution}'"
    try:
        version = importlib.metadata.version(library.distribution)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=library.distribution, status=missing, detail="not installed", adds=library.adds, fix=install)
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        detail = f"{version}, but Jetway needs {requirement.specifier}"
        return Finding(name=library.distribution, status="wrong", detail=detail, fix=f"pip install '{requirement}'")
    output, error = probe(library.probe)
    if error:
        fix = f"pip install --force-reinstall --no-deps '{library.distribution}=={version}'"
        return Finding(name=library.distribution, status=missing, detail=f"{version} is installed, but: {error}", adds=library.adds, fix=fix)
    return Finding(name=library.distribution, status="ok", detail=f"{version} {output}".strip(), adds=library.adds)


def probe(program: str) -> tuple[str, str]:
    """Runs a few lines of Python in a child; returns (what it printed after `detail: `, the last line of its error or "")."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return "; ".join(line.removeprefix("detail: ") for line in done.stdout.splitlines() if line.startswith("detail: ")), ""
    lines = done.stderr.strip().splitlines()
    return "", lines[-1] if lines else f"exit code {done.returncode}"


def _required_versions() -> dict[str, Requirement]:
    """Distribution -> requirement of the installed Jetway; empty when it runs from a plain checkout."""
    try:
        texts = importlib.metadata.requires("jetway") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(text.partition(";")[0]) for text in texts]
    return {requirement.name: requirement for requirement in requirements}


def _python() -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    return Finding(name="python", status="ok", detail=detail)


def _apex() -> Finding:
    """By symbol: the package index holds an unrelated `apex`, so that the name alone proves nothing."""
    adds = "FusedAdam, weight gradients added inside the product under tensor parallelism, and an RMSNorm to compare with"
    _, error = probe(_APEX_PROBE)
    if not error:
        return Finding(name="apex", status="ok", detail="FusedAdam, fused_weight_gradient_mlp_cuda", adds=adds)
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name="apex", status="absent", detail="not installed", adds=adds, fix=_APEX_BUILD)
    detail = f"{version} is another package of that name, or built without its CUDA extensions ({error})"
    return Finding(name="apex", status="note", detail=detail, adds=adds, fix=f"pip uninstall apex, then {_APEX_BUILD}")


def _gpu_driver() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding(name="gpu driver", status="absent", detail="no nvidia-smi", adds="training on GPUs")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return Finding(name="gpu driver", status="wrong", detail=(done.stderr or done.stdout).strip(), fix="reload the driver")
    _, error = probe("import torch\nassert torch.cuda.is_available(), f'torch {torch.__version__} sees no GPU'")
    gpus = "; ".join(done.stdout.strip().splitlines())
    if error:
        fix = "install a CUDA build of torch that fits the driver: make env TORCH='torch==VERSION'"
        return Finding(name="gpu driver", status="wrong", detail=f"{gpus}, but {error}", fix=fix)
    return Finding(name="gpu driver", status="ok", detail=gpus)


def _wandb_login() -> Finding:
    adds = "runs mirrored to a wandb account (without one: log.wandb=offline)"
    if os.environ.get("WANDB_API_KEY"):
        return Finding(name="wandb login", status="ok", detail="WANDB_API_KEY is set", adds=adds)
    try:
        known = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    if known:
        return Finding(name="wandb login", status="ok", detail="found in .netrc", adds=adds)
    return Finding(name="wandb login", status="absent", detail="no account here", adds=adds, fix="wandb login")


def _disk(folder: Path) -> Finding:
    existing = next(candidate for candidate in [folder.absolute(), *folder.absolute().parents] if candidate.exists())
    free = shutil.disk_usage(existing).free / 2**30
    detail = f"{free:.1f} GiB free at {existing}"
    if not os.access(existing, os.W_OK):
        return Finding(name="disk", status="wrong", detail=f"{existing} is not writable", fix="choose another output_dir")
    if free < MIN_DISK_GIB:
        return Finding(name="disk", status="note", detail=f"{detail}: little for data and checkpoints", fix="choose another output_dir")
    return Finding(name="disk", status="ok", detail=detail)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(name="shared memory", status="note", detail="no /dev/shm: Ray falls back to the disk, slower")
    size = shutil.disk_usage(path).total / 2**30
    if size < MIN_SHARED_MEMORY_GIB:
        fix = "in a container: start it with --shm-size=8g"
        return Finding(name="shared memory", status="note", detail=f"{size:.2f} GiB at /dev/shm: little for Ray and nccl", fix=fix)
    return Finding(name="shared memory", status="ok", detail=f"{size:.1f} GiB at /dev/shm")


def _cpu() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding(name="cpu", status="ok", detail=f"{usable} cores, {platform.machine()}")


def _git() -> Finding:
    if shutil.which("git") is None:
        return Finding(name="git", status="note", detail="not found: runs record no revision", fix="install git")
    done = subprocess.run(["git", "--version"], capture_output=True, text=True, check=False)
    return Finding(name="git", status="ok", detail=done.stdout.strip())


def _kernels() -> list[Finding]:
    """What `kernels.*=auto` takes here for each operation in a bf16 run, and what stood in the way of something better."""
    answer, error = probe(_KERNELS_PROBE)
    if error:
        return [Finding(name="kernels", status="note", detail=f"cannot be told: {error}")]
    device, choices = json.loads(answer)
    section = f"kernels (this machine: {device}, bf16), as kernels.*=auto chooses them"
    return [
        Finding(name=choice["operation"], status="ok", detail=f"{choice['implementation']}: {choice['reason']}", section=section)
        for choice in choices
    ]


def _report(findings: Sequence[Finding]) -> str:
    marks = {"ok": "ok    ", "absent": "absent", "note": "note  ", "wrong": "WRONG "}
    width = max(len(finding.name) for finding in findings)
    lines = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        lines.append(f"{marks[finding.status]}  {finding.name:<{width}}  {finding.detail}")
        if finding.adds and finding.status != "ok":
            lines.append(f"{'':8}{'':<{width}}  would add: {finding.adds}")
        if finding.fix:
            lines.append(
                f"{'':8}{'':<{width}}  to fix: {finding.fix}" if finding.status != "absent" else f"{'':8}{'':<{width}}  to add: {finding.fix}"
            )
    wrong = [finding.name for finding in findings if finding.status == "wrong"]
    lines += ["", f"{len(wrong)} thing(s) wrong: {', '.join(wrong)}" if wrong else "Nothing is wrong."]
    return "\n".join(lines)
