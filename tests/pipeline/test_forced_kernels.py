"""A forced kernel that cannot run ends a command before it opens or builds anything: sampling comes hours after the first step."""

import dataclasses
from pathlib import Path

import pytest
import torch

from model.kernels.config import KernelsConfig
from pipeline import evaluate
from pipeline.config import RunConfig
from pipeline.parallel.agreement import SharedUserError
from pipeline.parallel.layout import Layout
from pipeline.trainer import Trainer


def test_training_refuses_at_its_start(tiny_config: RunConfig, tmp_path: Path) -> None:
    layout = Layout(rank=0, world_size=1, local_rank=0, tensor=1, data=1, pipe=1, device=torch.device("cpu"))
    for forced in (KernelsConfig(rms_norm="apex"), KernelsConfig(gradient_accumulation_fusion="on")):
        config = dataclasses.replace(tiny_config, output_dir=str(tmp_path / "run"), kernels=forced)
        with pytest.raises(SharedUserError, match=r"kernels\.(rms_norm=apex|gradient_accumulation_fusion=on) cannot run here"):
            Trainer(config, layout)
    assert not (tmp_path / "run").exists()


def test_evaluation_refuses_at_its_start(tiny_run: Path) -> None:
    with pytest.raises(SharedUserError, match=r"kernels\.rms_norm=apex cannot run here"):
        evaluate.main([str(tiny_run), "device=cpu", "kernels.rms_norm=apex"])
