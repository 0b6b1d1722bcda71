"""The command line: lazy verbs, one message for a user's mistake, exit codes."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from configs.errors import UserError
from launch import cli


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Replaces the table by one verb, `act`, whose behaviour the test sets as `.main`."""
    module = types.ModuleType("launch_test_verb")
    monkeypatch.setitem(sys.modules, "launch_test_verb", module)
    monkeypatch.setattr(cli, "VERBS", (cli.Verb("act", "launch_test_verb", "Group", "does a thing"),))
    monkeypatch.delenv("JETWAY_TRACEBACK", raising=False)
    return types.SimpleNamespace(set=lambda main: setattr(module, "main", main))


def raiser(error: BaseException):
    def main(argv: list[str]) -> int:
        raise error

    return main


def test_arguments_after_the_verb_and_exit_code_pass_through(verb, capsys) -> None:
    received = []
    verb.set(lambda argv: received.extend(argv) or 7)
    assert cli.main(["act", "a=1", "--dry-run"]) == 7
    assert received == ["a=1", "--dry-run"]


def test_user_error_is_one_message_without_stack(verb, capsys) -> None:
    verb.set(raiser(UserError("no data set", got="runs/x", expected="a manifest", fix="run `jetway prep`")))
    assert cli.main(["act"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jetway: no data set")
    assert "run `jetway prep`" in captured.err
    assert "Traceback" not in captured.err


def test_traceback_on_request(verb, capsys, monkeypatch) -> None:
    verb.set(raiser(UserError("no data set")))
    assert cli.main(["act", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("JETWAY_TRACEBACK", "1")
    assert cli.main(["act"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_130(verb, capsys) -> None:
    verb.set(raiser(KeyboardInterrupt()))
    assert cli.main(["act"]) == 130


def test_full_disk_is_a_message(verb, capsys) -> None:
    verb.set(raiser(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/shard.tar")))
    assert cli.main(["act"]) == 2
    assert "no space left" in capsys.readouterr().err


def test_path_that_cannot_be_used_is_a_message(verb, capsys, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    verb.set(lambda argv: (tmp_path / "file" / "run").mkdir())
    assert cli.main(["act"]) == 2
    assert f"{tmp_path / 'file' / 'run'} cannot be used\n  got: Not a directory" in capsys.readouterr().err


def test_unknown_log_level_is_a_message(verb, capsys, monkeypatch) -> None:
    monkeypatch.setenv("JETWAY_LOG_LEVEL", "loud")
    assert cli.main(["act"]) == 2
    assert "JETWAY_LOG_LEVEL=LOUD" in capsys.readouterr().err


def test_our_own_bugs_keep_their_stack(verb) -> None:
    verb.set(raiser(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["act"])


def test_missing_package_points_to_doctor(verb, capsys) -> None:
    verb.set(raiser(ModuleNotFoundError("No module named 's3fs'", name="s3fs")))
    assert cli.main(["act"]) == 2
    assert "jetway doctor" in capsys.readouterr().err


def test_missing_module_of_ours_is_a_bug(verb) -> None:
    verb.set(raiser(ModuleNotFoundError("No module named 'pipeline.trian'", name="pipeline.trian")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["act"])


def test_unknown_verb_is_met_with_a_suggestion(capsys) -> None:
    assert cli.main(["tarin"]) == 2
    assert "did you mean `jetway train`?" in capsys.readouterr().err


def test_help_lists_every_verb(capsys) -> None:
    assert cli.main([]) == 0
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb.name} " in text for verb in cli.VERBS)


def test_reader_that_left_is_no_error(repository: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--help"], cwd=repository, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
