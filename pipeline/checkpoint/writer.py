"""Saving: every rank writes its fragments, rank 0 commits, and a kill at any moment leaves the previous checkpoint in force.

The protocol is drawn in README.md.
"""

import contextlib
import errno
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from pipeline.checkpoint.files import Entry, write_safetensors, write_text
from pipeline.checkpoint.folder import CheckpointFolder, KeepPolicy
from pipeline.checkpoint.format import CHECKSUMS, DTYPE_NAMES, FORMAT, MANIFEST, Fragment, Manifest, StoredFile, StoredFragment
from pipeline.checkpoint.geometry import Region
from pipeline.checkpoint.ranks import Ranks

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 << 30
"""A rank starts another file beyond this, so that many readers can verify in parallel."""


class SaveFailed(UserError):  # noqa: N818 - reads as what happened, and is logged rather than fatal
    """The checkpoint could not be written (disk full, quota, no permission): raised on every rank, with older checkpoints untouched.

    Training may log it and go on.
    """


@dataclass(frozen=True, slots=True)
class _Problem:
    rank: int
    text: str
    from_disk: bool
    """The operating system refused, as opposed to a mistake of the program."""
    disk_full: bool


def save(
    run_dir: Path | str,
    step: int,
    fragments: Iterable[Fragment],
    state: Mapping[str, Any],
    *,
    group: Any = None,
    keep: KeepPolicy | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes and commits the checkpoint of `step` under RUN_DIR/checkpoints. Collective: every rank of `group` calls it.

    Ranks may pass the same region of a tensor (replicas): one copy is written, by the holder with the least to write.

    Args:
        fragments: all that this rank holds; together they must cover every tensor they name.
        state: JSON-able; rank 0's is stored. Keys that readers of this repository use are listed in README.md.
        group: a gloo process group (default group if None; no process group initialised means a single process).
        keep: what to delete after the commit; None keeps everything.

    Returns:
        The committed folder.

    Raises:
        SaveFailed: on every rank, if any could not write; the temporary folder is gone, `latest` and older checkpoints are as before.
        RuntimeError: on every rank, if the fragments contradict each other or leave gaps, or `state` is not JSON-able.
    """
    ranks, folder = Ranks(group), CheckpointFolder(run_dir)
    save_id = ranks.broadcast(uuid.uuid4().hex[:12])
    temporary = folder.temporary_path(step, save_id)
    offered = _attempt(ranks, lambda: _keyed(fragments))
    own = _deduplicate(ranks, offered)
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            _attempt_first(ranks, lambda: _open_temporary(stack, folder, step, save_id))
        else:
            _attempt_first(ranks)
        try:
            written = _attempt(ranks, lambda: _write_files(temporary, ranks.rank, own, max_file_bytes))
            gathered = ranks.gather(written)
            _attempt_first(ranks, lambda: _publish(folder, temporary, gathered, (step, save_id, state)))
        except (SaveFailed, _ProgramError):
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    if ranks.is_first and keep is not None:
        try:
            folder.prune(step, keep)
        except OSError as error:
            logger.warning("old checkpoints in %s could not be deleted: %s", folder.path, error)
    return folder.step_path(step)


class _ProgramError(RuntimeError):
    """A mistake of the caller's, agreed on by all ranks."""


def _open_temporary(stack: contextlib.ExitStack, folder: CheckpointFolder, step: int, save_id: str) -> None:
    folder.sweep()
    stack.enter_context(folder.temporary(step, save_id))


def _describe(rank: int, error: Exception) -> _Problem:
    number = error.errno if isinstance(error, OSError) else None
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return _Problem(rank, f"rank {rank}: {type(error).__name__}: {error}", isinstance(error, OSError), full)


def _attempt(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """Runs `action` on every rank; if it fails on any, every rank raises the same error, so that none is left waiting."""
    result, problem = None, None
    try:
        result = action()
    except Exception as error:
        logger.debug("checkpoint save failed", exc_info=True)
        problem = _describe(ranks.rank, error)
    _raise_together([p for p in ranks.all_gather(problem) if p is not None])
    return result


def _attempt_first(ranks: Ranks, action: Callable[[], Any] | None = None) -> None:
    """Runs `action` on rank 0; all ranks learn how it went."""
    problem = None
    if ranks.is_first and action is not None:
        try:
            action()
        except Exception as error:
            logger.debug("checkpoint save failed", exc_info=True)
            problem = _describe(ranks.rank, error)
    problem = ranks.broadcast(problem)
    _raise_together([problem] if problem is not None else [])


def _raise_together(problems: list[_Problem]) -> None:
    if not problems:
        return
    text = "; ".join(problem.text for problem in problems[:4])
    if not all(problem.from_disk for problem in problems):
        raise _ProgramError(f"checkpoint not saved: {text}")
    full = any(problem.disk_full for problem in problems)
    raise SaveFailed(
        "checkpoint not saved" + (": the disk is full" if full else ""),
        got=text,
        expected="a writable disk with room for one more checkpoint; older checkpoints are untouched",
        fix="free space, or lower checkpoint.keep_last" if full else "check the folder's permissions and the file system",
    )


_Key = tuple[str, Region]


def _keyed(fragments: Iterable[Fragment]) -> dict[_Key, Fragment]:
    keyed: dict[_Key, Fragment] = {}
    for fragment in fragments:
        if fragment.tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{fragment.name} is of type {fragment.tensor.dtype}, which a checkpoint cannot store")
        keyed.setdefault((fragment.name, fragment.region), fragment)
    return keyed


def _deduplicate(ranks: Ranks, offered: dict[_Key, Fragment]) -> list[Fragment]:
    """The fragments that this rank is to write. Collective.

    Of several holders of a region the one with the fewest bytes so far takes it, which spreads replicated tensors over the replicas.
    """
    gathered = ranks.gather({key: fragment.tensor.numel() * fragment.tensor.dtype.itemsize for key, fragment in offered.items()})
    takers: dict[_Key, int] = {}
    if ranks.is_first:
        holders: dict[_Key, list[int]] = {}
        for rank, sizes in enumerate(gathered):
            for key in sizes:
                holders.setdefault(key, []).append(rank)
        load = [0] * ranks.size
        # Regions with one holder first: they are not ours to place, but they count.
        for key in sorted(holders, key=lambda key: len(holders[key]) > 1):
            taker = takers[key] = min(holders[key], key=lambda rank: (load[rank], rank))
            load[taker] += gathered[taker][key]
    takers = ranks.broadcast(takers)
    return [fragment for key, fragment in offered.items() if takers[key] == ranks.rank]


def _write_files(folder: Path, rank: int, fragments: list[Fragment], max_file_bytes: int) -> tuple[list[StoredFile], list[StoredFragment]]:
    files: list[StoredFile] = []
    stored: list[StoredFragment] = []
    for number, group in enumerate(_split(fragments, max_file_bytes)):
        name = f"rank-{rank:05d}-{number:03d}.safetensors"
        entries, keys = [], set[str]()
        for fragment in group:
            key = fragment.name if fragment.name not in keys else f"{fragment.name}#{len(keys)}"
            keys.add(key)
            tensor = fragment.tensor
            entries.append(Entry(key, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor))  # type: ignore[misc]
            stored.append(StoredFragment(name=fragment.name, dtype=DTYPE_NAMES[tensor.dtype], file=name, key=key, region=fragment.region))
        num_bytes, sha256 = write_safetensors(folder / name, entries, {"format": FORMAT})
        files.append(StoredFile(name=name, num_bytes=num_bytes, sha256=sha256))
    return files, stored


def _split(fragments: list[Fragment], max_bytes: int) -> list[list[Fragment]]:
    groups: list[list[Fragment]] = []
    room = 0
    for fragment in fragments:
        size = fragment.tensor.numel() * fragment.tensor.dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(fragment)
        room -= size
    return groups


def _publish(
    folder: CheckpointFolder,
    temporary: Path,
    gathered: list[tuple[list[StoredFile], list[StoredFragment]]],
    identity: tuple[int, str, Mapping[str, Any]],
) -> None:
    """Rank 0: manifest, checksums, rename, `latest`."""
    step, save_id, state = identity
    files = [file for files, _ in gathered for file in files]
    for file in files:
        path = temporary / file.name
        if not path.exists() or path.stat().st_size != file.num_bytes:
            raise FileNotFoundError(errno.ENOENT, f"{file.name} as another rank wrote it is not in rank 0's {temporary}: is the folder shared?")
    manifest = Manifest.build(step, files, (fragment for _, stored in gathered for fragment in stored), state)
    sha256 = write_text(temporary / MANIFEST, manifest.to_json())
    write_text(temporary / CHECKSUMS, manifest.checksums(sha256))
    folder.commit(temporary, step, save_id)
    logger.info("checkpoint of step %d saved: %s (%.1f MB)", step, folder.step_path(step), sum(f.num_bytes for f in files) / 1e6)


__all__ = ["MAX_FILE_BYTES", "KeepPolicy", "SaveFailed", "save"]
