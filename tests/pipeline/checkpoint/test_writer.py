"""A save is published whole or not at all, whatever happens meanwhile; a full disk is survivable."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import writer
from pipeline.checkpoint.folder import CheckpointFolder, KeepPolicy
from pipeline.checkpoint.format import Fragment
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.writer import SaveFailed, save


def run_scenario(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("processes.py")), name, str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_at_20_random_moments_never_loses_ground(tmp_path: Path) -> None:
    result = run_scenario("kill_at_random_moments", tmp_path)
    assert result["interrupted"] > 0  # otherwise nothing was shown
    assert result["reached"] > 0
    assert result["leftovers"] == []
    assert result["corrupt"] == 0


def test_killed_before_any_change_of_the_disk_the_previous_or_the_new_one_is_good(tmp_path: Path) -> None:
    result = run_scenario("kill_at_every_call", tmp_path)
    assert all(number > 10 for number in result["calls"])


@pytest.mark.distributed
def test_ranks_save_together_and_replicas_are_written_once(tmp_path: Path) -> None:
    result = run_scenario("ranks_save_together", tmp_path)
    assert result["codes"] == [0, 0]
    assert result["step"] == 2
    assert result["files"] == ["SHA256SUMS", "manifest.json", "rank-00000-000.safetensors", "rank-00001-000.safetensors"]


@pytest.mark.distributed
def test_ranks_agree_on_the_fallback(tmp_path: Path) -> None:
    assert run_scenario("ranks_agree_on_the_fallback", tmp_path) == {"codes": [0, 0], "step": 1}


@pytest.mark.distributed
def test_a_rank_killed_while_saving_moves_nothing(tmp_path: Path) -> None:
    result = run_scenario("one_rank_is_killed", tmp_path)
    assert result["codes"] == [1, -9]
    assert result["latest"] == "step_00000001\n"
    assert result["step"] == 1
    assert result["leftovers"] == []


@pytest.mark.distributed
def test_a_full_disk_of_one_rank_is_survived_by_all(tmp_path: Path) -> None:
    assert run_scenario("one_rank_has_no_disk", tmp_path) == {"codes": [0, 0], "step": 3}


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 4 kB, as on a full disk (EFBIG). Around the call alone: pytest's own report may be a longer file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint_and_no_trace(tmp_path: Path) -> None:
    save(tmp_path, 1, [Fragment.whole("param/x", torch.ones(4))], {})
    with pytest.raises(SaveFailed, match=r"(?s)the disk is full.*File too large.*free space"), small_files():
        save(tmp_path, 2, [Fragment.whole("param/x", torch.ones(4000))], {}, keep=KeepPolicy(keep_last=1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert open_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "latest"])
def test_a_disk_that_fills_at_the_last_moment_publishes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, [Fragment.whole("param/x", torch.ones(4))], {})
    original = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.name.startswith(name) and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(SaveFailed, match="the disk is full"):
        save(tmp_path, 2, [Fragment.whole("param/x", torch.ones(4))], {})
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert open_checkpoint(tmp_path).step == 1


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(SaveFailed, match="checkpoint not saved"):
        save(tmp_path, 1, [Fragment.whole("param/x", torch.ones(4))], {})


@pytest.mark.parametrize(
    ("fragments", "state", "message"),
    [
        ([Fragment(name="param/x", global_shape=(4,), tensor=torch.ones(3))], {}, "do not cover"),
        ([Fragment(name="param/x", global_shape=(4,), tensor=torch.ones(5))], {}, "leaves the slice"),
        ([Fragment(name="param/x", global_shape=(4, 2), tensor=torch.ones(4), shard_dim=0, shard_start=0, shard_size=2)], {}, "do not cover"),
        (
            [Fragment.whole("param/x", torch.ones(4)), Fragment(name="param/x", global_shape=(2, 2), tensor=torch.ones(1))],
            {},
            "disagree about shape or type",
        ),
        ([Fragment.whole("param/x", torch.ones(4, dtype=torch.complex64))], {}, "cannot store"),
        ([Fragment.whole("param/x", torch.ones(4))], {"bad": {1, 2}}, "not JSON serializable"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_published(
    fragments: list[Fragment], state: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=message):
        save(tmp_path, 1, fragments, state)
    assert CheckpointFolder(tmp_path).steps() == []
    assert not list((tmp_path / "checkpoints").glob("*")) if (tmp_path / "checkpoints").exists() else True


def test_files_are_plain_safetensors_and_checked_by_sha256sum(tmp_path: Path) -> None:
    mixed = {"param/flag": torch.tensor([True, False, True]), "param/x": torch.randn(5), "param/h": torch.randn(3).bfloat16()}
    path = save(tmp_path, 1, [Fragment.whole(name, tensor) for name, tensor in mixed.items()], {})
    loaded = load_file(path / "rank-00000-000.safetensors")
    assert set(loaded) == set(mixed)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in mixed.items())
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path, check=False).returncode == 0


def test_big_ranks_write_several_files(tmp_path: Path) -> None:
    path = save(tmp_path, 1, [Fragment.whole(f"param/{i}", torch.ones(100)) for i in range(7)], {}, max_file_bytes=900)
    assert len(list(path.glob("rank-00000-*.safetensors"))) == 4


def test_parameters_changed_after_the_save_are_not_in_it(tmp_path: Path) -> None:
    tensor = torch.ones(8)
    save(tmp_path, 1, [Fragment.whole("param/x", tensor)], {})
    tensor.zero_()
    assert open_checkpoint(tmp_path).read_full("param/x").tolist() == [1.0] * 8


def test_the_default_file_size_lets_many_readers_share_the_work() -> None:
    assert 1 << 28 <= writer.MAX_FILE_BYTES <= 1 << 34
