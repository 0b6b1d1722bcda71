"""Any slice from any fragmentation; damage of any kind is found, named, put aside and passed over."""

import logging
import pickle
import random
import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from pipeline.checkpoint import reader as reader_module
from pipeline.checkpoint.format import DTYPES, Fragment
from pipeline.checkpoint.reader import CheckpointReader, open_checkpoint, open_latest, verify_checkpoint
from pipeline.checkpoint.writer import save

SHAPES = {"param/vector": (13,), "param/matrix": (6, 10), "exp_avg/cube": (3, 7, 4), "param/scalar": (), "buffer/empty": (0, 3)}


def cut(total: int, rng: random.Random, parts: int) -> list[tuple[int, int]]:
    """[0, total) as up to `parts` uneven (start, size) pieces, none empty."""
    bounds = sorted({0, total, *(rng.randint(0, total) for _ in range(parts - 1))})
    return [(low, high - low) for low, high in zip(bounds, bounds[1:], strict=False)]


def fragments_of(name: str, tensor: torch.Tensor, rng: random.Random) -> list[Fragment]:
    """A random fragmentation: uneven slices along a random dimension, each cut into uneven flat ranges."""
    if tensor.numel() == 0 or tensor.dim() == 0:
        return [Fragment.whole(name, tensor)]
    dim = rng.choice([None, *range(tensor.dim())])
    slices = [(0, tensor.shape[0])] if dim is None else cut(tensor.shape[dim], rng, 3)
    fragments = []
    for start, size in slices:
        local = (tensor if dim is None else tensor.narrow(dim, start, size)).reshape(-1)
        for flat_start, length in cut(local.numel(), rng, 4):
            place: dict[str, Any] = {} if dim is None else {"shard_dim": dim, "shard_start": start, "shard_size": size}
            piece = local[flat_start : flat_start + length]
            fragments.append(Fragment(name=name, global_shape=tuple(tensor.shape), tensor=piece, flat_start=flat_start, **place))
    rng.shuffle(fragments)
    return fragments


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def save_simple(run: Path, step: int) -> Path:
    return save(run, step, [Fragment.whole(name, tensor) for name, tensor in tensors(step).items()], {"samples_seen": {"main": step * 8}})


@pytest.mark.parametrize("seed", range(20))
def test_every_slice_reads_back_from_every_fragmentation(seed: int, tmp_path: Path) -> None:
    rng, expected = random.Random(seed), tensors(seed)
    fragments = [fragment for name, tensor in expected.items() for fragment in fragments_of(name, tensor, rng)]
    save(tmp_path, 7, fragments, {}, max_file_bytes=rng.choice([64, 300, 1 << 20]))
    reader = open_latest(tmp_path)
    assert reader is not None
    assert reader.names() == sorted(SHAPES)
    for name, tensor in expected.items():
        assert torch.equal(reader.read_full(name), tensor)
        for fragment in fragments_of(name, tensor, rng) * 2:
            place = {key: getattr(fragment, key) for key in ("shard_dim", "shard_start", "shard_size", "flat_start")}
            assert torch.equal(reader.read(name, **place, flat_len=fragment.tensor.numel()), fragment.tensor), (name, place)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_type_round_trips_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.randint(0, 256, (24,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = (raw > 127) if dtype == torch.bool else raw.view(dtype)
    narrow = torch.ones(3, dtype=torch.bool)
    save(tmp_path, 1, [Fragment.whole("param/odd", narrow), Fragment.whole("param/x", tensor)], {})
    found = open_checkpoint(tmp_path).read_full("param/x")
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_only_the_needed_part_of_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, [Fragment.whole("param/big", torch.arange(10_000.0).reshape(100, 100))], {})
    spans: list[int] = []
    original = reader_module.view_box
    monkeypatch.setattr(reader_module, "view_box", lambda piece, *a, **k: (spans.append(piece.numel()), original(piece, *a, **k))[1])
    found = open_checkpoint(tmp_path).read("param/big", shard_dim=0, shard_start=40, shard_size=2)
    assert found.tolist() == list(range(4000, 4200))
    assert max(spans) == 200


def test_state_and_step_come_back(tmp_path: Path) -> None:
    save_simple(tmp_path, 123)
    reader = open_checkpoint(tmp_path)
    assert reader.step == 123
    assert reader.state == {"samples_seen": {"main": 984}}
    with pytest.raises(UserError, match="no tensor of this name"):
        reader.read("param/unknown")


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_anywhere_is_detected(seed: int, tmp_path: Path) -> None:
    path = save_simple(tmp_path, 5)
    assert verify_checkpoint(path) == []
    rng = random.Random(seed)
    victim = sorted(path.iterdir())[seed % 3]
    data = bytearray(victim.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    problems = verify_checkpoint(path)
    assert problems
    assert any(str(path) in problem for problem in problems)
    with pytest.raises(UserError, match="is damaged"):
        open_checkpoint(path)


def truncate(path: Path) -> None:
    victim = next(path.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-5])


def flip(path: Path) -> None:
    victim = next(path.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 4
    victim.write_bytes(data)


DAMAGE = {
    "truncated": (truncate, "safetensors: [0-9]+ bytes, expected"),
    "flipped": (flip, "safetensors: sha256 is"),
    "no data": (lambda path: next(path.glob("*.safetensors")).unlink(), "safetensors: missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json: missing"),
    "no checksums": (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS: missing"),
    "of another step": (lambda path: (shutil.rmtree(path), shutil.copytree(path.with_name("step_00000010"), path)), "is of step 10"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_falls_back_to_the_newest_good_one_and_quarantines_the_bad(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20, 30):
        save_simple(tmp_path, step)
    damage, message = DAMAGE[kind]
    damage(tmp_path / "checkpoints" / "step_00000030")
    with caplog.at_level(logging.WARNING):
        reader = open_latest(tmp_path)
    assert reader is not None
    assert reader.step == 20
    assert torch.equal(reader.read_full("param/matrix"), tensors(20)["param/matrix"])
    assert any(re.search(message, record.getMessage()) for record in caplog.records), caplog.text
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000010", "step_00000020", "step_00000030.corrupt"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000020\n"
    save_simple(tmp_path, 30)  # the run gets there again
    assert open_checkpoint(tmp_path).step == 30


def test_looking_without_repair_changes_nothing(tmp_path: Path) -> None:
    for step in (10, 20):
        save_simple(tmp_path, step)
    flip(tmp_path / "checkpoints" / "step_00000020")
    (tmp_path / "checkpoints" / "step_00000030.tmp-0123").mkdir()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    reader = open_latest(tmp_path, repair=False)
    assert reader is not None
    assert reader.step == 10
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_no_checkpoint_is_none_but_only_bad_ones_is_an_error(tmp_path: Path) -> None:
    assert open_latest(tmp_path) is None
    with pytest.raises(UserError, match="no checkpoint here"):
        open_checkpoint(tmp_path)
    path = save_simple(tmp_path, 10)
    flip(path)
    for _ in range(2):  # the second time it is already quarantined
        with pytest.raises(UserError, match=r"none of the checkpoints .* is good"):
            open_latest(tmp_path)


def test_latest_is_obeyed_and_rubbish_in_it_is_not(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_simple(tmp_path, step)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.write_text("step_00000020\n")
    assert open_checkpoint(tmp_path).step == 20
    for rubbish in ("step_00000099\n", "../../etc", ""):
        pointer.write_text(rubbish)
        assert open_checkpoint(tmp_path).step == 30
    pointer.unlink()
    assert open_checkpoint(tmp_path / "checkpoints").step == 30
    assert open_checkpoint(tmp_path / "checkpoints" / "step_00000010").step == 10


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_simple(tmp_path, 1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert verify_checkpoint(path) == []
    reader = open_latest(tmp_path)
    assert reader is not None
    assert prod(reader.read_full("param/matrix").shape) == 60


def test_a_file_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = save_simple(tmp_path, 1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace("rank-00000-000.safetensors", "../elsewhere.safetensors"))
    with pytest.raises(ValueError, match="leads out of the checkpoint"):
        CheckpointReader(path)
