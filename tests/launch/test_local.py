"""`jetway train` before anything starts: the checks, the dry run, and who starts processes."""

from pathlib import Path

import pytest

from configs.errors import UserError
from launch import local


@pytest.fixture(autouse=True)
def _outside_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int, Path]]:
    """Records what would be started in place of starting it."""
    calls: list[tuple[list[str], int, Path]] = []

    def record(command: list[str], *, num_processes: int, log_dir: Path) -> int:
        calls.append((command, num_processes, log_dir))
        return 0

    monkeypatch.setattr(local, "run_workers", record)
    return calls


def test_dry_run_prints_layout_and_writes_nothing(tmp_path: Path, capsys, started) -> None:
    output = tmp_path / "run"
    assert local.main(["train/digits", f"output_dir={output}", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 = 1 tensor x 1 pipeline x 2 data" in text
    assert "parameters " in text
    assert f"output_dir: {output}" in text
    assert not output.exists()
    assert not started


def test_dry_run_shows_the_stages_of_a_pipeline(capsys) -> None:
    local.main(["train/digits", "parallel.pipeline=2", "--dry-run"])
    stages = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")]
    assert len(stages) == 2
    assert "patchify .." in stages[0]
    assert ".. head" in stages[1]


def test_starts_the_configured_number_of_processes_with_the_same_words(tmp_path: Path, started) -> None:
    overrides = [f"output_dir={tmp_path}", "parallel.processes=4"]
    assert local.main(["train/digits", *overrides]) == 0
    [(command, num_processes, log_dir)] = started
    assert command[1:] == ["-m", "launch.cli", "train", "train/digits", *overrides]
    assert num_processes == 4
    assert log_dir == tmp_path / "logs"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("parallel.processes=3", "data-parallel degree 3"),
        ("parallel.tensor=4", "2 processes are not divisible"),
        ("parallel.tensor=8", "num_heads=4"),
        ("data.micro_batch_size=5", "data.micro_batch_size=5"),
        ("model.image.patch_size=3", "patch_size=3"),
    ],
)
def test_impossible_layout_is_refused_before_anything_starts(started, override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        local.main(["train/digits", override])
    assert not started


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "127.0.0.1"},
    ],
)
def test_inside_another_launcher_nothing_is_started(monkeypatch: pytest.MonkeyPatch, started, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    received: list[str] = []

    def train(argv: list[str]) -> int:
        received.extend(argv)
        return 5

    monkeypatch.setattr("pipeline.train.main", train)
    assert local.main(["train/digits", "seed=3"]) == 5
    assert received == ["train/digits", "seed=3"]
    assert not started


def test_batch_script_of_slurm_is_no_worker(monkeypatch: pytest.MonkeyPatch, started) -> None:
    """Inside sbatch, but before srun, SLURM_PROCID is set: the launcher must still start the processes."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert local.main(["train/digits"]) == 0
    assert len(started) == 1
