"""`python -m pipeline.train` and `pipeline.evaluate` as real processes: stopping together, failing together, agreeing on figures."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from configs.loader import load_config
from model.convert.big_vision import to_official
from model.jetformer import build_jetformer
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.config import RunConfig
from pipeline.import_ import main as import_
from pipeline.official_files import write_official
from tests.pipeline.data.conftest import WriteDataset, Written, intact, num_pieces, take_down, tokenizer_model, write_dataset  # noqa: F401 - fixtures

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

TIMEOUT_S = 120


@pytest.fixture(scope="module")
def run_file(intact: Written, num_pieces: int, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A configuration of seconds on the small data set."""
    values = {
        "total_steps": 400,
        "device": "cpu",
        "model": {
            "image": {"resolution": 8, "channels": 1, "patch_size": 2},
            "text": {"length": 6, "num_pieces": num_pieces, "logits_init_std": 0.2},
            "flow": {"depth": 2, "block_depth": 1, "width": 16, "num_heads": 2},
            "decoder": {"width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 2, "head_dim": 8},
            "gmm": {"num_mixtures": 4, "soft_dim": 2},
        },
        "data": {"path": str(intact.path), "global_batch_size": 4, "micro_batch_size": 2},
        "log": {"every_steps": 1, "peak_tflops": 0.1},
        "checkpoint": {"every_steps": 1000},
        "eval": {"every_steps": 0, "sample_every_steps": 0, "num_samples": 0, "batch_size": 4},
    }
    path = tmp_path_factory.mktemp("training") / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(program: Sequence[str], num_processes: int) -> list["subprocess.Popen[str]"]:
    """The ranks of one job, as a launcher starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *program],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]


def finish(workers: list["subprocess.Popen[str]"]) -> tuple[list[int], list[str]]:
    """Exit codes and error outputs; fails where a rank is left hanging."""
    try:
        outputs = [worker.communicate(timeout=TIMEOUT_S) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], [errors for _, errors in outputs]


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_signal_to_one_rank_stops_all_at_the_same_step(run_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    workers = start(["-m", "pipeline.train", str(run_file), f"output_dir={run}"], 2)
    deadline = time.monotonic() + TIMEOUT_S
    while len(records(run)) < 3 and time.monotonic() < deadline and workers[0].poll() is None:
        time.sleep(0.02)
    workers[1].send_signal(signal.SIGUSR1)
    codes, errors = finish(workers)
    assert codes == [0, 0], errors
    logged = records(run)
    assert 3 <= len(logged) < 400
    assert CheckpointFolder(run).steps() == [logged[-1]["step"]]
    assert f"stopped at step {logged[-1]['step']}" in errors[0]


def test_divergence_names_step_and_samples_and_stops_every_rank(run_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["optimizer.schedule=constant", "optimizer.warmup_fraction=0", "optimizer.learning_rate=1e30", "checkpoint.every_steps=1"]
    codes, errors = finish(start(["-m", "pipeline.train", str(run_file), f"output_dir={run}", *settings], 2))
    assert codes == [2, 2], errors
    assert "not finite at step 2" in errors[0]
    assert "positions 4-7" in errors[0], "the second global batch"
    assert "train-00000" in errors[0], "shards and keys of the samples"
    assert "Traceback" not in "".join(errors)
    assert CheckpointFolder(run).steps() == [1], "only the step before was saved"


def test_failure_of_one_rank_ends_the_others(run_file: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys, pipeline.train as train, pipeline.data.loader as loader\n"
        "original = loader.TrainLoader.__next__\n"
        "def broken(self):\n"
        "    if os.environ['RANK'] == '1' and self.num_captions >= 4: raise RuntimeError('this disk is gone')\n"
        "    return original(self)\n"
        "loader.TrainLoader.__next__ = broken\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    codes, errors = finish(start(["-c", program, str(run_file), f"output_dir={tmp_path / 'run'}"], 2))
    assert all(code != 0 for code in codes)
    assert codes[1] == 1
    assert "rank 1 failed" in errors[1]
    assert "this disk is gone" in errors[1]


def test_users_mistake_found_by_all_ranks_is_told_once(run_file: Path, tmp_path: Path) -> None:
    codes, errors = finish(start(["-m", "pipeline.train", str(run_file), f"output_dir={tmp_path / 'run'}", "data.path=nowhere"], 2))
    assert codes == [2, 2]
    assert "nowhere" in errors[0]
    assert "jetway:" not in errors[1]


def test_evaluation_is_the_same_on_every_layout(run_file: Path, tmp_path: Path) -> None:
    """Six held-out examples in batches of four: the last batch is smaller, and two ranks get three each."""
    run = tmp_path / "run"
    codes, errors = finish(start(["-m", "pipeline.train", str(run_file), f"output_dir={run}", "total_steps=6"], 1))
    assert codes == [0], errors
    # Twice on one process: to the digit. The training run's own evaluation comes first.
    for size, layout in ((1, ()), (2, ()), (2, ("parallel.pipeline=2",)), (2, ("parallel.tensor=2",))):
        codes, errors = finish(start(["-m", "pipeline.evaluate", str(run), *layout], size))
        assert codes == [0] * size, errors
    in_training, again, *others = records(run, "eval.jsonl")
    names = ["image_bits", "image_bits_unconditional", "text_nats", "text_nats_unconditional", "text_perplexity"]
    assert len(others) == 3
    assert [again[name] for name in names] == [in_training[name] for name in names]
    for other in others:
        assert [other[name] for name in names] == pytest.approx([again[name] for name in names], rel=1e-5)
        assert other["num_examples"] == 6
    assert again["image_bits"] == pytest.approx(8.5, abs=1.0), "an untrained model is near 8.5 bits"


def test_a_takedown_between_two_starts_is_honoured_by_all_ranks(run_file: Path, write_dataset: WriteDataset, tmp_path: Path) -> None:  # noqa: F811
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    settings = [str(run_file), f"output_dir={run}", f"data.path={data.path}", "eval.every_steps=2"]
    codes, errors = finish(start(["-m", "pipeline.train", *settings, "total_steps=2"], 1))
    assert codes == [0], errors
    take_down(data.path, train_000001=[0, 2], heldout_000000=[1])
    codes, errors = finish(start(["-m", "pipeline.train", *settings, "total_steps=4"], 2))
    assert codes == [0, 0], errors
    assert "takedown 1 is in force now (none when the checkpoint was saved): 2 of 21 samples of split 'train' are excluded" in errors[0]
    assert "21 samples, 2 of them taken down (takedown 1)" in errors[0]
    assert "takedown" not in errors[1]
    assert [record["num_examples"] for record in records(run, "eval.jsonl")] == [6, 5]
    assert [session["takedown"] for session in json.loads((run / "provenance.json").read_text())["sessions"]] == [0, 1]
    with open_checkpoint(CheckpointFolder(run).step_path(4)) as saved:
        assert saved.state["data"]["takedown"] == 1


@pytest.fixture(scope="module")
def official(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in the official layout, of the configuration of `run_file` but not as a run would start."""
    config = load_config(RunConfig, str(run_file), [])
    model = build_jetformer(config.model, seed=77)
    path = tmp_path_factory.mktemp("official") / "weights.npz"
    write_official(path, to_official(model.state_dict(), config.model), config.model)
    return path


def test_imported_weights_start_a_run_at_step_0(run_file: Path, official: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert import_([str(official), "--config", str(run_file), "--output", str(run)]) == 0
    # The first update has learning rate 0 (warm-up): it fills the moments, and leaves the weights as they were imported.
    program = ["-m", "pipeline.train", str(run_file), f"output_dir={run}", "total_steps=1", "parallel.pipeline=2", "optimizer.ema_decay=0.5"]
    codes, errors = finish(start(program, 2))
    assert codes == [0, 0], errors
    assert errors[0].count("starting") == 1
    assert "at step 0 from the weights in" in errors[0]
    assert [record["step"] for record in records(run)] == [1]
    folder = CheckpointFolder(run)
    assert folder.steps() == [0, 1]
    with open_checkpoint(folder.step_path(0)) as imported, open_checkpoint(folder.step_path(1)) as trained:
        assert trained.state["adam_step"] == 1
        assert trained.state["data"]["samples_seen"] == {"train": 4}
        for name in [*imported.names("param/"), *imported.names("buffer/")]:
            assert torch.equal(trained.read(name), imported.read(name)), name
        weights = imported.names("param/")
        assert all(torch.equal(trained.read(name.replace("param/", "ema/", 1)), imported.read(name)) for name in weights)
        assert any(trained.read(name.replace("param/", "exp_avg/", 1)).any() for name in weights)


def test_imported_weights_with_another_tokenizer_are_refused(run_file: Path, official: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.model"
    other.write_bytes(b"another one")
    assert import_([str(official), "--config", str(run_file), "--output", str(run), "--tokenizer", str(other)]) == 0
    codes, errors = finish(start(["-m", "pipeline.train", str(run_file), f"output_dir={run}"], 1))
    assert codes == [2], errors
    assert "tokenizer is not the one that the weights came with" in errors[0]
    assert "Traceback" not in errors[0]
    assert (run / "tokenizer.model").read_bytes() == other.read_bytes()
