"""Who this process is: torchrun, srun or a lone process. The only place of the pipeline that reads the environment.

| variable | read from | meaning |
|---|---|---|
| RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT | torchrun | rank, world and rendezvous |
| CUDA_VISIBLE_DEVICES | whoever starts the process | the GPUs that it is given |
| SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_ID, SLURM_JOB_ID, SLURM_STEP_NODELIST | srun | the same, where RANK is absent |
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnvironment:
    """Rank and rendezvous of this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str | None = None
    """Rendezvous host; None for a lone process, which needs none."""
    master_port: int = 0
    launcher: str = "single"

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> "ProcessEnvironment":
        """Reads torchrun's variables, else those of an srun step, else describes a lone process.

        Raises:
            UserError: a variable is missing or is no number.
        """
        environ = os.environ if environ is None else environ
        if "RANK" in environ and "WORLD_SIZE" in environ:
            world_size = _integer(environ, "WORLD_SIZE")
            if world_size == 1 and "MASTER_ADDR" not in environ:
                return cls()
            return cls(
                rank=_integer(environ, "RANK"),
                world_size=world_size,
                local_rank=_integer(environ, "LOCAL_RANK", default=environ["RANK"]),
                master_addr=_required(environ, "MASTER_ADDR"),
                master_port=_integer(environ, "MASTER_PORT"),
                launcher="torchrun",
            )
        # A batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process: only a step has these two.
        if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return cls(
                rank=_integer(environ, "SLURM_PROCID"),
                world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
                local_rank=_integer(environ, "SLURM_LOCALID"),
                master_addr=environ.get("MASTER_ADDR") or _slurm_head_address(environ),
                # Differs between jobs that share a node, and is the same in all tasks of one.
                master_port=int(environ.get("MASTER_PORT") or 20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000),
                launcher="srun",
            )
        return cls()

    def export(self) -> None:
        """Writes torchrun's variables: torch's `env://` rendezvous reads all of them, DeepSpeed reads LOCAL_RANK."""
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(self.rank), str(self.world_size)
        os.environ["LOCAL_RANK"] = str(self.local_rank)
        if self.master_addr is not None:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = self.master_addr, str(self.master_port)


def is_given_gpus(environ: Mapping[str, str] | None = None) -> bool:
    """Whether somebody chose which GPUs this process sees."""
    return "CUDA_VISIBLE_DEVICES" in (os.environ if environ is None else environ)


def _required(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise UserError(f"{name} is not set", expected="the variables that torchrun or srun sets", fix="start with `jetway train`, torchrun or srun")
    return environ[name]


def _integer(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default) if default is not None else _required(environ, name)
    try:
        return int(str(text))
    except ValueError:
        raise UserError(f"{name} must be a whole number", got=repr(text), fix="start with `jetway train`, torchrun or srun") from None


def _slurm_head_address(environ: Mapping[str, str]) -> str:
    """NodeAddr of the first node of the step: node names need not resolve, NodeAddr is what slurmctld itself uses."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    if not nodes or shutil.which("scontrol") is None:
        raise UserError(
            "cannot find the first node of this SLURM step",
            got=f"SLURM_STEP_NODELIST={nodes!r}, scontrol {'found' if shutil.which('scontrol') else 'not found'}",
            fix="export MASTER_ADDR (an address of the first node) before srun",
        )
    head = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout.split()[0]
    description = subprocess.run(["scontrol", "show", "node", "-o", head], capture_output=True, text=True, check=True).stdout
    addresses = [field.removeprefix("NodeAddr=") for field in description.split() if field.startswith("NodeAddr=")]
    return addresses[0] if addresses else head
