"""Retention never deletes what is needed; leftovers of the dead are swept, work of the living is not."""

import fcntl
import logging
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.folder import CheckpointFolder, KeepPolicy
from pipeline.checkpoint.format import Fragment
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.writer import save


def save_steps(run: Path, *steps: int, keep: KeepPolicy | None = None) -> None:
    for step in steps:
        save(run, step, [Fragment.whole("param/x", torch.full((4,), float(step)))], {}, keep=keep)


def test_keeps_the_last_and_the_multiples(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(5, 60, 5), keep=KeepPolicy(keep_last=2, keep_every_steps=20))
    assert CheckpointFolder(tmp_path).steps() == [20, 40, 50, 55]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000055\n"


def test_no_policy_keeps_everything(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    assert CheckpointFolder(tmp_path).steps() == [1, 2, 3]


def test_the_only_whole_checkpoint_is_not_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 10, 20)
    next((tmp_path / "checkpoints" / "step_00000020").glob("*.safetensors")).write_bytes(b"short")
    with caplog.at_level(logging.WARNING):
        assert CheckpointFolder(tmp_path).prune(20, KeepPolicy(keep_last=1)) == []
    assert CheckpointFolder(tmp_path).steps() == [10, 20]
    assert "none of the checkpoints to keep is whole" in caplog.text


def test_a_course_that_was_left_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, 30)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010\n")  # a user goes back
    save_steps(tmp_path, 12, 14, keep=KeepPolicy(keep_last=2))
    assert CheckpointFolder(tmp_path).steps() == [12, 14, 20, 30]
    assert open_checkpoint(tmp_path).step == 14


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    save(tmp_path, 10, [Fragment.whole("param/x", torch.ones(3))], {})
    assert open_checkpoint(tmp_path).read_full("param/x").tolist() == [1, 1, 1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000010"]


def test_the_replaced_one_comes_back_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    folder = CheckpointFolder(tmp_path)
    folder.step_path(10).rename(folder.path / "step_00000010.replaced-0123")
    folder.sweep()
    assert open_checkpoint(tmp_path).read_full("param/x").tolist() == [10.0] * 4


def test_sweeps_what_the_dead_left_but_not_the_work_of_the_living(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    folder = CheckpointFolder(tmp_path)
    for name in ("dead", "live"):
        folder.temporary_path(20, name).mkdir()
        (folder.temporary_path(20, name) / "rank-00000-000.safetensors").write_bytes(b"part")
        (folder.path / f"step_00000020.tmp-{name}.lock").touch()
    unrelated = folder.path / "step_00000020.notes"
    unrelated.mkdir()
    with (folder.path / "step_00000020.tmp-live.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        save_steps(tmp_path, 30)
        assert sorted(path.name for path in folder.path.iterdir()) == [
            *("latest", "step_00000010", "step_00000020.notes"),
            *("step_00000020.tmp-live", "step_00000020.tmp-live.lock", "step_00000030"),
        ]
    folder.sweep()
    assert not folder.temporary_path(20, "live").exists()
    assert unrelated.exists()


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"keep_every_steps": 0}])
def test_a_policy_that_keeps_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        KeepPolicy(**wrong)
