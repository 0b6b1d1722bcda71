"""The parts of the demo that decide what its figures mean; the whole of it runs in tests/end_to_end."""

import json
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from launch import demo


def test_dry_run_prints_every_command_and_writes_nothing(tmp_path: Path, capsys) -> None:
    root = tmp_path / "demo"
    assert demo.main(["--output", str(root), "total_steps=10", "--dry-run"]) == 0
    verbs = [" ".join(line.split()[1:3]) for line in capsys.readouterr().out.splitlines()]
    assert verbs == [*(f"jetway {verb}" for verb in ("prep", "train", "train", "eval", "sample", "caption")), "python -m"]
    assert not root.exists()


def test_overrides_may_stand_around_the_options(tmp_path: Path, capsys) -> None:
    assert demo.main(["total_steps=10", "--output", str(tmp_path / "demo"), "log.every_steps=1", "--dry-run"]) == 0
    assert "total_steps=10 log.every_steps=1" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["output_dir=elsewhere", "data.path=mine"])
def test_places_are_the_demos_own(override: str) -> None:
    with pytest.raises(UserError, match="--output"):
        demo.main([override, "--dry-run"])


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        demo._claim(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_folder_of_an_earlier_demo_is_made_anew(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    demo._claim(root)
    (root / "old").touch()
    demo._claim(root)
    assert [path.name for path in root.iterdir()] == [demo.MARKER]


def test_prompts_ask_equally_for_every_digit_in_several_wordings(tmp_path: Path) -> None:
    from data_prep.embedded.digits import parse_digit

    asked = demo._write_prompts(tmp_path / "prompts.txt")
    lines = (tmp_path / "prompts.txt").read_text().splitlines()
    assert [parse_digit(line) for line in lines] == asked
    assert all(asked.count(digit) == demo.NUM_IMAGES_PER_DIGIT for digit in range(10))
    assert len(set(lines)) > 50


def test_caption_counts_only_when_it_names_the_digit_and_no_other() -> None:
    labels = {"0.png": 7, "1.png": 7, "2.png": 7, "3.png": 7}
    captions = [
        {"file": "heldout/0.png", "caption": "a handwritten seven"},
        {"file": "heldout/1.png", "caption": "the digit 1"},
        {"file": "heldout/2.png", "caption": "seven or one"},
    ]  # and none for the last
    assert demo._caption_accuracy(captions, labels) == 0.25


def test_half_written_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert demo._records(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert demo._records(path) == [{"step": 1}, {"step": 2}]


def test_training_is_stopped_once_the_log_reaches_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    metrics = tmp_path / "metrics.jsonl"
    program = f"""
import json, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: (print("stopped in order", flush=True), sys.exit(0)))
for step in range(10, 2000, 10):
    with open({str(metrics)!r}, "a") as file:
        file.write(json.dumps(dict(step=step)) + "\\n")
    time.sleep(0.1)
"""
    start = demo.subprocess.Popen
    monkeypatch.setattr(demo.subprocess, "Popen", lambda command, stdout: start([sys.executable, "-c", program], stdout=stdout))
    demo._run_until_step(["jetway", "train", "x"], 30, metrics)
    assert "stopped in order" in capfd.readouterr().out
    assert 30 <= json.loads(metrics.read_text().splitlines()[-1])["step"] < 1000


def test_failed_command_stops_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    start = demo.subprocess.Popen
    monkeypatch.setattr(demo.subprocess, "Popen", lambda command, stdout: start([sys.executable, "-c", "raise SystemExit(3)"]))
    with pytest.raises(UserError, match="exit code 3"):
        demo._run(["jetway", "eval", "x"])


def test_long_output_is_cut_and_counted(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    start = demo.subprocess.Popen
    program = "for number in range(30): print('line', number)"
    monkeypatch.setattr(demo.subprocess, "Popen", lambda command, stdout: start([sys.executable, "-c", program], stdout=stdout))
    demo._run(["jetway", "caption", "x"], num_lines=3)
    assert capsys.readouterr().out.splitlines()[1:] == ["line 0", "line 1", "line 2", "... and 27 more"]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_a_demo_that_is_ended_ends_the_command_it_runs(ending: type[BaseException]) -> None:
    with pytest.raises(ending), demo._running(["python", "-c", "import time; time.sleep(600)"]) as process:
        raise ending
    assert process.poll() is not None


def test_a_command_that_fails_ends_the_demo_with_its_name() -> None:
    with pytest.raises(UserError, match="python -c"):
        demo._run(["python", "-c", "raise SystemExit(3)"])
