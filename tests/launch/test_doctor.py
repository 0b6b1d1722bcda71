"""The doctor tells absent from broken, by importing for real."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from packaging.requirements import Requirement

from launch import doctor
from launch.doctor import Library, examine_library
from model.kernels.dispatch import OPERATIONS


def test_installed_library_is_ok_with_its_version() -> None:
    finding = examine_library(Library(distribution="numpy", probe="import numpy\nprint('detail: seen')"), Requirement("numpy>=1.0"))
    assert finding.status == "ok"
    assert finding.detail == f"{importlib.metadata.version('numpy')} seen"


@pytest.mark.parametrize(("required", "status"), [(True, "wrong"), (False, "absent")])
def test_missing_library(required: bool, status: str) -> None:
    finding = examine_library(Library(distribution="jetway-no-such-thing", probe="", required=required, adds="speed", extra="gpu"), None)
    assert finding.status == status
    assert finding.fix == "pip install -e '.[gpu]'"


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


def test_foreign_apex_on_the_path_is_told_and_enables_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """`pip install apex` brings a web toolkit of that name."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("class RootFactory: ...\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.10dev")
    finding = doctor._apex()
    assert finding.status == "note"
    assert "0.9.10dev is another package of that name" in finding.detail
    assert finding.fix.startswith("pip uninstall apex, then APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install")
    assert not [kernel.name for kernel in doctor._kernels() if kernel.detail.startswith(("apex:", "on:"))]


def test_every_kernel_has_a_line_that_says_why() -> None:
    findings = doctor._kernels()
    assert [finding.name for finding in findings] == list(OPERATIONS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert {finding.section for finding in findings} == {f"kernels (this machine: {device}, bf16), as kernels.*=auto chooses them"}
    for finding in findings:
        implementation, _, reason = finding.detail.partition(": ")
        assert implementation in {one.name for one in OPERATIONS[finding.name]}
        assert reason
        assert finding.status == "ok"
    assert doctor._report(findings).startswith("\nkernels (this machine: ")


@pytest.mark.parametrize("interprets", ["0", "1"])
def test_interpreter_is_never_what_runs_here(monkeypatch: pytest.MonkeyPatch, interprets: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interprets)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    kernels = {finding.name: finding.detail for finding in doctor._kernels()}
    assert not any(detail.startswith("triton") for detail in kernels.values())
    if importlib.util.find_spec("triton") is not None:
        assert ("interpreter" in kernels["rope"]) == (interprets == "1")


def test_kernels_that_cannot_be_told_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda program: ("", "ImportError: libcudart.so.12"))
    (finding,) = doctor._kernels()
    assert (finding.name, finding.status) == ("kernels", "note")
    assert "libcudart" in finding.detail


def test_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    broken = Library(distribution="jetway-no-such-thing", probe="")
    fine = Library(distribution="numpy", probe="import numpy")
    monkeypatch.setattr(doctor, "LIBRARIES", (fine,))
    monkeypatch.setattr(doctor, "_gpu_driver", lambda: doctor.Finding(name="gpu driver", status="absent", detail="no nvidia-smi"))
    assert doctor.main(["--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["numpy"]["status"] == "ok"
    assert found["gmm_nll"]["section"].startswith("kernels (this machine: ")
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
