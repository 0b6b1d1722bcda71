"""Our data sets are ordinary WebDataset tars: every other tool reads the same samples, none more, none less, none changed."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.samples import StoredSample
from data_prep.schema import Manifest
from data_prep.storage import open_storage
from tests.peers.conftest import run
from tests.peers.environments import interpreter

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

Samples = dict[str, StoredSample]
READ = Path(__file__).with_name("read.py")
ALWAYS = ("key", "caption", "source", "width", "height", "format", "sha256")
FIELD_MAP = '{"image":"jpg","caption":"txt"}'


def expected(samples: Samples) -> dict[str, dict[str, Any]]:
    """What every tool must find, by key."""
    return {
        key: {"jpg": hashlib.sha256(sample.image).hexdigest(), "txt": sample.caption, "json": without_empty(sample.values)}
        for key, sample in samples.items()
    }


def without_empty(value: Any) -> Any:
    """An object without the fields that are null: tools with one schema for all samples fill those in."""
    if not isinstance(value, dict):
        return value
    kept = {name: without_empty(inner) for name, inner in value.items() if inner is not None}
    return {name: inner for name, inner in kept.items() if inner != {}}


def found_by(tool: str, python: Path | str, folder: Path, out: Path) -> dict[str, dict[str, Any]]:
    """What a tool reads, by key; a key that comes twice fails here."""
    run(python, READ, tool, folder, out)
    found: dict[str, dict[str, Any]] = {}
    for line in out.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        key = sample.pop("key")
        assert key not in found, f"{tool} reads {key} twice"
        found[key] = {**sample, "json": without_empty(sample["json"])}
    return found


def members(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, content) of every member, by the standard library."""
    for path in sorted((folder / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None, member.name
                key, _, extension = member.name.partition(".")
                yield key, extension, file.read()


def assert_all(samples: Samples, content: dict[str, dict[str, bytes]]) -> None:
    """Checks members, by key and extension, against our own reader."""
    assert content.keys() == samples.keys()
    for key, sample in samples.items():
        assert content[key].keys() == {"jpg", "txt", "json"}
        assert content[key]["jpg"] == sample.image
        assert content[key]["txt"].decode() == sample.caption
        assert json.loads(content[key]["json"]) == sample.values


@pytest.mark.parametrize("environment", ["webdataset-0.2.86", "webdataset-0.2.111"])
def test_old_webdataset_reads_every_sample(environment: str, data_set: Path, samples: Samples, tmp_path: Path) -> None:
    assert found_by("webdataset", interpreter(environment), data_set, tmp_path / "found") == expected(samples)


@pytest.mark.parametrize("tool", ["webdataset", "ray"])
def test_installed_tool_reads_every_sample(tool: str, data_set: Path, samples: Samples, tmp_path: Path) -> None:
    assert found_by(tool, sys.executable, data_set, tmp_path / "found") == expected(samples)


def test_hugging_face_datasets_streams_every_sample(data_set: Path, samples: Samples, tmp_path: Path) -> None:
    found, wanted = found_by("datasets", interpreter("datasets"), data_set, tmp_path / "found"), expected(samples)
    assert {key: (sample["jpg"], sample["txt"]) for key, sample in found.items()} == {key: (s["jpg"], s["txt"]) for key, s in wanted.items()}
    for key, sample in found.items():  # its schema is that of the first five samples: it drops fields that only later ones have
        assert sample["json"].items() >= {name: wanted[key]["json"][name] for name in ALWAYS}.items()
        assert sample["json"].get("label") == wanted[key]["json"].get("label")


def test_energon_prepares_lints_and_reads_every_sample(data_set: Path, samples: Samples, tmp_path: Path) -> None:
    energon, folder = interpreter("energon").with_name("energon"), tmp_path / "set"
    shutil.copytree(data_set, folder, ignore=shutil.ignore_patterns("dropped"))
    run(energon, "prepare", folder, "--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--field-map", FIELD_MAP)
    run(energon, "lint", folder)
    assert f"{len(samples)}" in run(energon, "info", folder)
    run(Path(sys.executable).with_name("jetway"), "verify", folder)  # what energon leaves in the folder disturbs nothing of ours
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    assert found_by("energon", interpreter("energon"), folder, tmp_path / "found") == expected(samples)


def test_energon_takes_our_splits_and_leaves_out_what_was_dropped(data_set: Path, tmp_path: Path) -> None:
    energon, folder = interpreter("energon").with_name("energon"), tmp_path / "set"
    shutil.copytree(data_set, folder)
    splits = [f"--split-parts={theirs}:shards/{ours}-.*" for theirs, ours in (("train", "train"), ("val", "heldout"))]
    yaml = ("--sample-type", "CaptioningSample", "--field-map", FIELD_MAP)
    run(energon, "prepare", folder, "--non-interactive", "--exclude", "^dropped/", *splits, *yaml)
    run(energon, "lint", folder, "--split-parts", "train,val")
    report = run(energon, "info", folder)
    for theirs, ours in (("train", "train"), ("val", "heldout")):
        count = Manifest.load(open_storage(str(data_set))).splits[ours].num_samples
        assert re.search(rf"`{theirs}`: [^\n]* {count} samples", report), report


def test_gnu_tar_lists_and_unpacks_every_member(data_set: Path, samples: Samples, tmp_path: Path) -> None:
    content: dict[str, dict[str, bytes]] = {}
    for path in sorted((data_set / "shards").glob("*.tar")):
        done = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
        assert not done.stderr
        run("tar", "xf", path, "-C", tmp_path)
        for name in done.stdout.splitlines():
            key, _, extension = name.partition(".")
            content.setdefault(key, {})[extension] = (tmp_path / name).read_bytes()
    assert_all(samples, content)


def test_python_tarfile_reads_every_member(data_set: Path, samples: Samples) -> None:
    content: dict[str, dict[str, bytes]] = {}
    for key, extension, data in members(data_set):
        assert extension not in content.setdefault(key, {}), f"{key}.{extension} comes twice"
        content[key][extension] = data
    assert_all(samples, content)
