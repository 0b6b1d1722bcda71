"""Every step stands once in metrics.jsonl whatever happens to the run; artefacts and provenance are there; wandb keeps its run id."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.loader import config_hash, load_config
from pipeline.config import LogConfig, RunConfig
from pipeline.image_grid import image_grid
from pipeline.provenance import git_revision, provenance
from pipeline.tracker import Tracker, read_json, read_records

CONFIG = RunConfig(name="test")


def steps(run: Path, name: str = "metrics.jsonl") -> list[int]:
    return [record["step"] for record in read_records(run / name)]


def test_every_step_stands_once_across_three_restarts(tmp_path: Path) -> None:
    logged_until = 0
    for resumed_step, last in ((None, 7), (4, 9), (8, 12), (8, 16)):
        tracker = Tracker(tmp_path, CONFIG, resumed_step=resumed_step)
        for step in range((resumed_step or 0) + 1, last + 1):
            tracker.log({"step": step, "loss": 1.0 / step})
        logged_until = last
        with (tmp_path / "metrics.jsonl").open("a") as file:  # killed in the middle of a line
            file.write('{"step": 999, "lo')
    tracker = Tracker(tmp_path, CONFIG, resumed_step=logged_until)
    tracker.log({"step": 17})
    assert steps(tmp_path) == list(range(1, 18))
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_evaluations_captions_and_samples_go_back_too(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, CONFIG)
    for step in (10, 20):
        tracker.log_eval({"step": step, "image_bits": 5.0})
        tracker.save_captions(step, [{"key": "a", "caption": "a seven", "reference": "the digit 7"}])
        tracker.save_samples(step, torch.zeros(3, 4, 4, 1, dtype=torch.uint8), ["a", "b", "c"])
    Tracker(tmp_path, CONFIG, resumed_step=10)
    assert steps(tmp_path, "eval.jsonl") == [10]
    assert steps(tmp_path, "captions.jsonl") == [10]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_00000010.json", "step_00000010.png"]


def test_a_fresh_start_moves_old_metrics_out_of_the_way(tmp_path: Path) -> None:
    Tracker(tmp_path, CONFIG).log({"step": 5})
    Tracker(tmp_path, CONFIG).log({"step": 1})
    assert steps(tmp_path) == [1]
    assert steps(tmp_path, "metrics.jsonl.old") == [5]


def test_values_that_are_not_finite_leave_valid_json(tmp_path: Path) -> None:
    Tracker(tmp_path, CONFIG).log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "name": "é"})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "name": "é"}


def test_a_full_disk_costs_a_line_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, CONFIG)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        tracker.log({"step": 1})
        tracker.save_samples(1, torch.zeros(1, 4, 4, 3, dtype=torch.uint8), ["a"])
    assert "one record lost" in caplog.text
    assert "not saved" in caplog.text


def test_config_and_provenance_say_what_made_the_run(tmp_path: Path) -> None:
    Tracker(tmp_path, CONFIG, session={"world_size": 2})
    Tracker(tmp_path, CONFIG, resumed_step=40, session={"world_size": 4})
    assert load_config(RunConfig, tmp_path / "config.yaml") == CONFIG
    record = read_json(tmp_path / "provenance.json")
    assert [(session["step"], session["world_size"]) for session in record["sessions"]] == [(0, 2), (40, 4)]
    assert record["sessions"][0]["config_hash"] == config_hash(CONFIG)
    assert record["sessions"][0]["versions"]["torch"] == torch.__version__


def test_provenance_names_no_host_and_no_folder() -> None:
    record = provenance(CONFIG, ["/somewhere/bin/jetway", "train", "digits"])
    assert record["command"] == ["jetway", "train", "digits"]
    assert "/somewhere" not in json.dumps(record)


def test_the_revision_is_that_of_this_checkout() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("not run from a git checkout")
    assert git_revision()["revision"] == head.stdout.strip()
    assert git_revision()["dirty"] in (True, False)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Tracker(tmp_path / "file" / "run", CONFIG)


@pytest.mark.parametrize(("count", "channels", "size"), [(1, 1, 8), (5, 3, 8), (10, 3, 64), (23, 1, 100)])
def test_a_grid_shows_every_image(count: int, channels: int, size: int) -> None:
    images = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None].expand(count, size, size, channels)
    grid = image_grid(images)
    shown = {pixel[0] for _, pixel in grid.getcolors(1 << 20)}  # type: ignore[union-attr,misc,index]
    assert set(range(1, count + 1)) <= shown
    assert max(grid.size) <= 10 * (max(size, 64) + 8 + 2)


def test_samples_are_saved_with_their_prompts(tmp_path: Path) -> None:
    path = Tracker(tmp_path, CONFIG).save_samples(7, torch.full((2, 8, 8, 3), 9, dtype=torch.uint8), ["a seven", "ein Acht"])
    assert Image.open(path).size == (130, 64)
    assert json.loads(path.with_suffix(".json").read_text()) == {"step": 7, "prompts": ["a seven", "ein Acht"]}


WANDB = replace(CONFIG, log=LogConfig(wandb="offline"))


def test_wandb_missing_matters_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert Tracker(tmp_path, CONFIG).wandb_run_id is None
    with pytest.raises(UserError, match="wandb is not installed"):
        Tracker(tmp_path, WANDB)


def test_wandb_is_not_imported_unless_asked_for(tmp_path: Path) -> None:
    code = f"import sys, pipeline.tracker as t; t.Tracker({str(tmp_path)!r}, t.RunConfig()); assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_wandb_offline_keeps_one_run_id_over_kill_and_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    first = Tracker(tmp_path, WANDB)
    first.log({"step": 1, "loss": 2.0})
    first.close()
    assert first.wandb_run_id is not None
    ids: list[Any] = [first.wandb_run_id]
    for stored in (None, first.wandb_run_id):  # the run's folder alone remembers it; so does the checkpoint
        again = Tracker(tmp_path, WANDB, resumed_step=1, wandb_run_id=stored)
        again.log({"step": 2, "loss": 1.0})
        again.close()
        ids.append(again.wandb_run_id)
    assert len(set(ids)) == 1
    mirrors = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert mirrors
    assert all(first.wandb_run_id in name for name in mirrors)
    assert steps(tmp_path) == [1, 2]
