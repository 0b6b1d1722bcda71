"""The folder `RUN/checkpoints`: names, the `latest` pointer, leftovers of killed saves, retention, quarantine.

step_00001000/              a committed checkpoint; never changes
step_00002000.tmp-ID/       one being written (or deleted), with step_00002000.tmp-ID.lock held by its writer for as long as it lives
step_00001000.replaced-ID/  an older one of the same step, for the instant between two renames
step_00001000.corrupt/      failed verification; kept for inspection, never read again
latest                      the name of the newest committed one
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.files import fsync_folder, replace_text
from pipeline.checkpoint.format import MANIFEST, Manifest

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")
_TEMPORARY = re.compile(r"step_\d{8,}\.tmp-\w+")
_REPLACED = re.compile(r"(step_\d{8,})\.replaced-\w+")
_UNLOCKABLE_MAX_AGE_S = 24 * 3600
"""On a file system without locks, a temporary folder is taken for dead after this long without a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepPolicy:
    """Which checkpoints stay: the newest `keep_last`, and every multiple of `keep_every_steps`."""

    keep_last: int = 2
    keep_every_steps: int | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last} must be at least 1: a run without a checkpoint cannot resume")
        if self.keep_every_steps is not None and self.keep_every_steps < 1:
            raise ValueError(f"keep_every_steps={self.keep_every_steps} must be at least 1 (or null)")


def step_name(step: int) -> str:
    """Folder name of a committed checkpoint."""
    return f"step_{step:08d}"


class CheckpointFolder:
    """Names and life cycle of the checkpoints of one run. Used by one process at a time, except for reading."""

    def __init__(self, run_dir: Path | str) -> None:
        self.path = Path(run_dir) / FOLDER

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; none are verified."""
        if not self.path.is_dir():
            return []
        return sorted(int(m[1]) for entry in self.path.iterdir() if (m := _STEP.fullmatch(entry.name)) and entry.is_dir())

    def step_path(self, step: int) -> Path:
        """Where the checkpoint of a step is committed."""
        return self.path / step_name(step)

    def latest_step(self) -> int | None:
        """The step that `latest` names; None where the pointer is missing or names nothing that exists."""
        try:
            text = (self.path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return None
        match = _STEP.fullmatch(text)
        if match is None or not self.step_path(int(match[1])).is_dir():
            logger.warning("%s says %r, which is no checkpoint here: taking the newest folder", self.path / LATEST, text[:80])
            return None
        return int(match[1])

    def candidates(self) -> list[int]:
        """Steps in the order in which resuming tries them: the one `latest` names, older ones newest first, then newer ones.

        Newer ones exist when a user went back by editing `latest`, or a kill fell between a commit and the pointer's move.
        """
        steps, latest = self.steps(), self.latest_step()
        if latest is None:
            return steps[::-1]
        return [s for s in steps[::-1] if s <= latest] + [s for s in steps[::-1] if s > latest]

    def corrupt(self) -> list[Path]:
        """Quarantined folders."""
        return sorted(entry for entry in self.path.glob("step_*.corrupt*") if entry.is_dir()) if self.path.is_dir() else []

    @contextlib.contextmanager
    def temporary(self, step: int, save_id: str) -> Iterator[Path]:
        """A fresh folder to write into, guarded by a lock that dies with this process. What is left of it at the end is deleted by `sweep`."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.temporary_path(step, save_id)
        lock = path.with_name(f"{path.name}.lock")
        with lock.open("w") as file:
            with contextlib.suppress(OSError):  # a file system without locks: sweep goes by age there
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.mkdir()
            try:
                yield path
            finally:
                if not path.exists():
                    lock.unlink(missing_ok=True)

    def temporary_path(self, step: int, save_id: str) -> Path:
        """The folder that all ranks of one save write into."""
        return self.path / f"{step_name(step)}.tmp-{save_id}"

    def commit(self, temporary: Path, step: int, save_id: str) -> Path:
        """Publishes a finished temporary folder under its final name, then moves `latest`.

        Everything that needs disk space happens before the rename, so that a full disk cannot leave a commit half done.
        """
        final, pointer = self.step_path(step), self.path / f"{LATEST}.tmp-{save_id}"
        replaced = final.with_name(f"{final.name}.replaced-{save_id}")
        try:
            with pointer.open("w", encoding="utf-8") as file:
                file.write(f"{final.name}\n")
                file.flush()
                os.fsync(file.fileno())
            fsync_folder(temporary)
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            fsync_folder(self.path)
            pointer.replace(self.path / LATEST)
            fsync_folder(self.path)
        except BaseException:
            pointer.unlink(missing_ok=True)
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def point_latest(self, step: int) -> None:
        """Makes `latest` name a committed checkpoint."""
        replace_text(self.path / LATEST, f"{step_name(step)}\n")

    def sweep(self) -> None:
        """Deletes what killed saves left behind; folders whose writer still lives are not touched."""
        if not self.path.is_dir():
            return
        for entry in sorted(self.path.iterdir()):
            if (match := _REPLACED.fullmatch(entry.name)) is not None:
                if (self.path / match[1]).exists():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.rename(self.path / match[1])
                    logger.warning("%s: brought back after a kill between two renames", self.path / match[1])
            elif _TEMPORARY.fullmatch(entry.name) and not _is_locked(entry):
                logger.warning("%s: left behind by a save that did not finish; deleted", entry)
                shutil.rmtree(entry, ignore_errors=True)
        for lock in self.path.glob("step_*.tmp-*.lock"):
            if not lock.with_suffix("").exists() and not _is_locked(lock.with_suffix("")):
                lock.unlink(missing_ok=True)
        for pointer in self.path.glob(f"{LATEST}.tmp-*"):
            if time.time() - pointer.stat().st_mtime > _UNLOCKABLE_MAX_AGE_S:
                pointer.unlink(missing_ok=True)

    def prune(self, newest: int, keep: KeepPolicy) -> list[int]:
        """Deletes the checkpoints that the policy does not keep; returns their steps.

        Steps beyond `newest` (the one just saved) belong to a course that the run has left: they are neither counted nor deleted. Nothing is
        deleted unless one that stays is whole (manifest readable, every file there with its size).
        """
        steps = [step for step in self.steps() if step <= newest]
        kept = set(steps[-keep.keep_last :])
        if keep.keep_every_steps is not None:
            kept |= {step for step in steps if step % keep.keep_every_steps == 0}
        doomed = [step for step in steps if step not in kept]
        if doomed and not any(_looks_whole(self.step_path(step)) for step in kept):
            logger.warning("%s: none of the checkpoints to keep is whole, so the older ones stay", self.path)
            return []
        for step in doomed:
            # Renamed first: a kill in the middle of the deletion must not leave a folder that looks like a damaged checkpoint.
            grave = self.temporary_path(step, f"deleted{os.getpid()}")
            self.step_path(step).rename(grave)
            shutil.rmtree(grave, ignore_errors=True)
        return doomed

    def quarantine(self, step: int) -> Path:
        """Renames a bad checkpoint so that nothing reads it again; returns its new path."""
        source = self.step_path(step)
        for number in range(1, 1000):
            target = source.with_name(f"{source.name}.corrupt" + (f"-{number}" if number > 1 else ""))
            if not target.exists():
                source.rename(target)
                fsync_folder(self.path)
                return target
        raise OSError(errno.EEXIST, f"too many quarantined copies of {source}")


def _is_locked(temporary: Path) -> bool:
    """Whether the writer of a temporary folder is alive."""
    lock = temporary.with_name(f"{temporary.name}.lock")
    try:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return time.time() - lock.stat().st_mtime < _UNLOCKABLE_MAX_AGE_S


def _looks_whole(path: Path) -> bool:
    try:
        manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"))
        return all((path / file.name).stat().st_size == file.num_bytes for file in manifest.files)
    except (OSError, ValueError):
        return False
