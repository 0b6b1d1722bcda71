"""Loading: verify, fall back, and read any slice of any tensor from whatever fragments are stored. Nothing is ever unpickled."""

import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from configs.errors import UserError
from pipeline.checkpoint.files import hash_file
from pipeline.checkpoint.folder import FOLDER, CheckpointFolder, step_name
from pipeline.checkpoint.format import CHECKSUMS, DTYPES, MANIFEST, Manifest, StoredFragment, StoredTensor, make_region
from pipeline.checkpoint.geometry import Box, Region, box_span, overlap, view_box
from pipeline.checkpoint.ranks import Ranks

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 64
"""Data files kept mapped at a time by one reader."""
NUM_VERIFY_THREADS = 4
"""Files that one process digests at a time; hashing leaves the interpreter lock."""


class CheckpointReader:
    """Random access to one checkpoint. Does not verify digests: `open_checkpoint` and `open_latest` do."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = Manifest.from_json((self.path / MANIFEST).read_text(encoding="utf-8"))
        self._open: OrderedDict[str, Any] = OrderedDict()

    @property
    def step(self) -> int:
        """Optimiser steps done when it was saved."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state given to `save`."""
        return dict(self.manifest.state)

    def names(self, prefix: str = "") -> list[str]:
        """Stored tensor names that start with `prefix`, sorted."""
        return sorted(name for name in self.manifest.tensors if name.startswith(prefix))

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return self._tensor(name).global_shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor."""
        return DTYPES[self._tensor(name).dtype]

    def read(
        self,
        name: str,
        *,
        shard_dim: int | None = None,
        shard_start: int = 0,
        shard_size: int | None = None,
        flat_start: int = 0,
        flat_len: int | None = None,
    ) -> Tensor:
        """Any flat range of any tensor-parallel slice: what a `Fragment` of the same place would hold.

        Only the bytes of the stored fragments that overlap are touched (the files are memory-mapped).

        Returns:
            1-D CPU tensor of `flat_len` elements (default: to the end of the slice), a copy.

        Raises:
            UserError: no tensor of that name.
            ValueError: the slice leaves the tensor.
        """
        tensor = self._tensor(name)
        wanted = make_region(
            tensor.global_shape,
            shard_dim=shard_dim,
            shard_start=shard_start,
            shard_size=shard_size,
            flat_start=flat_start,
            flat_len=flat_len,
        )
        result = torch.empty(wanted.flat_len, dtype=DTYPES[tensor.dtype])
        target_boxes = wanted.boxes()
        seen: set[Region] = set()
        for fragment in tensor.fragments:
            if fragment.region not in seen:
                seen.add(fragment.region)
                self._copy_overlap(fragment, target_boxes, result)
        return result

    def read_full(self, name: str) -> Tensor:
        """The whole tensor in its global shape."""
        return self.read(name).view(self.shape(name))

    def close(self) -> None:
        """Unmaps all files."""
        self._open.clear()

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensor(self, name: str) -> StoredTensor:
        try:
            return self.manifest.tensors[name]
        except KeyError:
            raise UserError(f"the checkpoint {self.path} holds no tensor of this name", got=name) from None

    def _copy_overlap(self, fragment: StoredFragment, targets: list[Box], result: Tensor) -> None:
        for source in fragment.region.boxes():
            for target in targets:
                shared = overlap(source, target)
                if shared is None:
                    continue
                low, high = box_span(source, *shared)
                piece = self._file(fragment.file).get_slice(fragment.key)[low:high]
                view_box(result, target, *shared).copy_(view_box(piece, source, *shared, piece_offset=low))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)
            self._open[name] = safe_open(self.path / name, framework="pt", device="cpu")
        self._open.move_to_end(name)
        return self._open[name]


def verify_checkpoint(path: Path | str) -> list[str]:
    """Everything that is wrong with a committed checkpoint, one line each naming the file; empty if it is good.

    Reads every byte: sizes, sha256 digests (the manifest's own included), and that the fragments cover every tensor.

    Raises:
        UserError: the disk could not be read for another reason than a missing file.
    """
    return _verify(Path(path), Ranks.alone())


def _verify(path: Path, ranks: Ranks) -> list[str]:
    """As `verify_checkpoint`; the ranks share the files, and all return the same list."""
    problems: list[str] = []
    unreadable = None
    try:
        manifest, problems = _verify_manifest(path)
        own = manifest.files[ranks.rank :: ranks.size] if manifest is not None else ()
        with ThreadPoolExecutor(NUM_VERIFY_THREADS) as pool:
            for found in pool.map(lambda file: _verify_file(path / file.name, file.num_bytes, file.sha256), own):
                problems += found
    except OSError as error:
        unreadable = str(error)
    gathered = ranks.all_gather((problems, unreadable))
    refused = [text for _, text in gathered if text is not None]
    if refused:
        # Not corruption: a permission or an ailing disk must not get a good checkpoint quarantined.
        raise UserError(f"the checkpoint {path} could not be read", got=refused[0], fix="check permissions and the file system")
    return sorted({problem for part, _ in gathered for problem in part})


def _verify_file(path: Path, num_bytes: int, sha256: str) -> list[str]:
    try:
        size = path.stat().st_size
        if size != num_bytes:
            return [f"{path}: {size} bytes, expected {num_bytes}"]
        found = hash_file(path)
    except FileNotFoundError:
        return [f"{path}: missing"]
    return [] if found == sha256 else [f"{path}: sha256 is {found}, expected {sha256}"]


def _verify_manifest(path: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest, if its own digest is right, and what is wrong with it."""
    manifest_path, sums_path = path / MANIFEST, path / CHECKSUMS
    try:
        digest = hash_file(manifest_path)
        sums = sums_path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        return None, [f"{error.filename}: missing"]
    if not sums.endswith(f"{digest}  {MANIFEST}\n"):
        return None, [f"{manifest_path}: sha256 is {digest}, which is not what {CHECKSUMS} says"]
    try:
        manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"))
    except ValueError as error:
        return None, [f"{manifest_path}: unreadable ({error})"]
    problems = [] if sums == manifest.checksums(digest) else [f"{sums_path}: does not agree with {MANIFEST}"]
    problems += [f"{manifest_path}: {name} is incomplete" for name, tensor in manifest.tensors.items() if not tensor.is_complete()]
    if path.name.startswith("step_") and path.name.split(".")[0] != step_name(manifest.step):
        problems.append(f"{manifest_path}: is of step {manifest.step}, not of this folder's")
    return manifest, problems


def open_checkpoint(path: Path | str, *, group: Any = None, alone: bool = False, verify: bool = True) -> CheckpointReader:
    """One named checkpoint (`.../step_XXXXXXXX`), or the newest good one of a run if `path` is a run's folder. Collective.

    Changes nothing on disk, so it may be used on a run that is being trained.

    Args:
        alone: only this process calls, also inside a job of many.

    Raises:
        UserError: no such checkpoint, or it is damaged (the message names the file and what is wrong).
    """
    ranks = Ranks.alone() if alone else Ranks(group)
    path = Path(path)
    if not (path / MANIFEST).is_file() and not (path.is_dir() and path.name.startswith("step_")):
        runs = [run for run in (path, path.parent) if (run / FOLDER).is_dir() and (run == path or path.name == FOLDER)]
        reader = _open_newest(runs[0], ranks, repair=False) if runs else None
        if reader is None:
            raise UserError("no checkpoint here", got=path, expected="a folder step_XXXXXXXX, or a run's folder with checkpoints/ in it")
        return reader
    problems = _verify(path, ranks) if verify else []
    if problems:
        raise UserError(f"the checkpoint {path} is damaged", got="; ".join(problems[:4]), fix="use another step, or restore the files")
    try:
        return CheckpointReader(path)
    except ValueError as error:
        raise UserError(f"the checkpoint {path} cannot be read", got=error) from None


def open_latest(run_dir: Path | str, *, group: Any = None, repair: bool = True) -> CheckpointReader | None:
    """The newest good checkpoint of a run; None if the run has none. Collective: all ranks agree on which.

    A damaged one is reported with the file and what is wrong with it, and passed over for the next older.

    Args:
        repair: quarantine damaged checkpoints (renamed to `step_XXXXXXXX.corrupt`), sweep leftovers of killed saves and move `latest`.
            False changes nothing on disk.

    Raises:
        UserError: the run had checkpoints but none is good: starting over silently would throw its work away.
    """
    return _open_newest(run_dir, Ranks(group), repair=repair)


def _open_newest(run_dir: Path | str, ranks: Ranks, *, repair: bool) -> CheckpointReader | None:
    folder = CheckpointFolder(run_dir)
    if ranks.is_first and repair:
        folder.sweep()
    candidates, corrupt = ranks.broadcast((folder.candidates(), [str(p) for p in folder.corrupt()]) if ranks.is_first else ([], []))
    for step in candidates:
        path = folder.step_path(step)
        problems = _verify(path, ranks)
        if not problems:
            if ranks.is_first and repair and folder.latest_step() != step:
                folder.point_latest(step)
            return CheckpointReader(path)
        if not ranks.broadcast(path.exists()):
            continue  # deleted by its run's retention while we looked
        if ranks.is_first:
            logger.warning("checkpoint of step %d is damaged and not used: %s", step, "; ".join(problems[:4]))
        corrupt.append(str(path))
        if ranks.is_first and repair:
            logger.warning("%s moved to %s", path, folder.quarantine(step))
    if corrupt:
        raise UserError(
            f"none of the checkpoints in {folder.path} is good",
            got=", ".join(corrupt),
            fix="restore one from a copy, or delete these folders to start again from step 0",
        )
    return None
