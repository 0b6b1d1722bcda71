"""The doctor tells absent from broken, by importing for real."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from launch import doctor
from launch.doctor import Library, examine_library


def test_installed_library_is_ok_with_its_version() -> None:
    finding = examine_library(Library(distribution="numpy", probe="import numpy\nprint('detail: seen')"), Requirement("numpy>=1.0"))
    assert finding.status == "ok"
    assert finding.detail == f"{importlib.metadata.version('numpy')} seen"


@pytest.mark.parametrize(("required", "status"), [(True, "wrong"), (False, "absent")])
def test_missing_library(required: bool, status: str) -> None:
    finding = examine_library(Library(distribution="jetway-no-such-thing", probe="", required=required, adds="speed", extra="gpu"), None)
    assert finding.status == status
    assert finding.fix == "pip install 'jetway[gpu]'"


def test_library_that_does_not_import_is_wrong() -> None:
    finding = examine_library(Library(distribution="numpy", probe="raise ImportError('libcuda.so.1 not found')"), None)
    assert finding.status == "wrong"
    assert "libcuda.so.1 not found" in finding.detail
    assert finding.fix


def test_too_old_library_is_wrong() -> None:
    finding = examine_library(Library(distribution="numpy", probe="import numpy"), Requirement("numpy>=999"))
    assert finding.status == "wrong"
    assert ">=999" in finding.detail


def test_foreign_apex_is_not_taken_for_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda program: ("", "ImportError: cannot import name 'FusedAdam'"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.10dev")
    finding = doctor._apex()
    assert finding.status == "note"
    assert "another package" in finding.detail


def test_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    broken = Library(distribution="jetway-no-such-thing", probe="")
    fine = Library(distribution="numpy", probe="import numpy")
    monkeypatch.setattr(doctor, "LIBRARIES", (fine,))
    monkeypatch.setattr(doctor, "_gpu_driver", lambda: doctor.Finding(name="gpu driver", status="absent", detail="no nvidia-smi"))
    assert doctor.main(["--json"]) == 0
    assert {finding["name"]: finding["status"] for finding in json.loads(capsys.readouterr().out)}["numpy"] == "ok"
    monkeypatch.setattr(doctor, "LIBRARIES", (fine, broken))
    assert doctor.main([]) == 1
    assert "1 thing(s) wrong: jetway-no-such-thing" in capsys.readouterr().out


def test_dry_run_runs_no_check(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a check ran"))
    assert doctor.main(["--dry-run"]) == 0
    assert "deepspeed" in capsys.readouterr().out


def test_required_libraries_are_those_of_setup() -> None:
    """What setup.py requires, the doctor examines (small pure-Python helpers aside)."""
    text = (doctor.Path(__file__).resolve().parents[2] / "setup.py").read_text()
    namespace: dict[str, object] = {}
    start, stop = text.index("INSTALL_REQUIRES"), text.index("EXTRAS")
    exec(text[start:stop], namespace)  # the list literal alone: importing setup.py would run setup()
    required = {Requirement(line).name for line in namespace["INSTALL_REQUIRES"]}  # type: ignore[attr-defined]
    examined = {library.distribution for library in doctor.LIBRARIES if library.required}
    assert required - examined == {"numpy", "pyyaml", "tqdm", "packaging"}
    assert examined <= required
    assert "apex" not in text
    assert sys.version_info >= (3, 10)
