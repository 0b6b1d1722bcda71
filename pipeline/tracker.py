"""The files that a run leaves besides its checkpoints, and their mirror in wandb. Used by one process of the run.

    config.yaml provenance.json metrics.jsonl eval.jsonl captions.jsonl samples/step_XXXXXXXX.png (+ .json with the prompts)

metrics.jsonl is the truth: every logged step stands in it once, in order, however often the run was killed and resumed.
"""

import base64
import importlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.loader import to_dict, to_yaml
from pipeline.config import RunConfig
from pipeline.image_grid import encode_png, image_grid, thumbnail
from pipeline.provenance import provenance

logger = logging.getLogger(__name__)

METRICS, EVAL, CAPTIONS, SAMPLES, CONFIG, PROVENANCE = (
    *("metrics.jsonl", "eval.jsonl", "captions.jsonl"),
    *("samples", "config.yaml", "provenance.json"),
)


class Tracker:
    """Appends records, saves artefacts, mirrors to wandb. Opening it puts the folder into the state of the step resumed from."""

    def __init__(
        self,
        run_dir: Path | str,
        config: RunConfig,
        *,
        resumed_step: int | None = None,
        wandb_run_id: str | None = None,
        session: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes config.yaml and provenance.json, and drops what was logged after the checkpoint that the run resumes from.

        Args:
            resumed_step: step of that checkpoint; None for a fresh start, which moves an older metrics.jsonl out of the way.
            wandb_run_id: as the checkpoint stores it; None looks in the run's folder.
            session: facts of this start worth keeping, for example the layout.

        Raises:
            UserError: the folder cannot be written, or wandb was asked for and is not there.
        """
        self.run_dir, self._config = Path(run_dir), config
        try:
            (self.run_dir / SAMPLES).mkdir(parents=True, exist_ok=True)
            self._go_back_to(resumed_step)
            stored = self._write_provenance(resumed_step, wandb_run_id, session or {})
            _replace(self.run_dir / CONFIG, to_yaml(config))
        except OSError as error:
            raise UserError("the run's folder cannot be written", got=error, fix="choose another output_dir") from None
        self.wandb_run_id: str | None = stored if config.log.wandb != "off" else None
        self._wandb = start_wandb(config, self.run_dir, self.wandb_run_id) if self.wandb_run_id is not None else None

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one training record (it holds `step`). A value that is not finite is written as null."""
        self._append(METRICS, record)
        self._mirror(record, prefix="")

    def log_eval(self, record: Mapping[str, Any]) -> None:
        """Appends the result of one evaluation (it holds `step`)."""
        self._append(EVAL, record)
        self._mirror(record, prefix="eval/")

    def save_samples(self, step: int, images: Tensor, prompts: Sequence[str]) -> Path:
        """Saves a grid of images drawn from prompts.

        Args:
            images: uint8 [N, H, W, 1 or 3]; prompts: one for each.

        Returns:
            The PNG's path.
        """
        path = self.run_dir / SAMPLES / f"step_{step:08d}.png"
        try:
            _replace(path.with_suffix(".json"), json.dumps({"step": step, "prompts": list(prompts)}, ensure_ascii=False, indent=1))
            _replace(path, encode_png(image_grid(images)))
        except OSError as error:
            logger.warning("%s: not saved: %s", path, error)
            return path
        if self._wandb is not None:
            self._wandb.log({"samples": importlib.import_module("wandb").Image(str(path))}, step=step)
        return path

    def save_captions(self, step: int, captions: Sequence[Mapping[str, Any]], images: Tensor | None = None) -> None:
        """Appends captions written by the model.

        Args:
            captions: mappings with `key`, `caption` and, where known, `reference` (text) and `correct` (bool).
            images: uint8 [N, H, W, 1 or 3], shown beside them in the report: stored as small PNGs in base64.
        """
        for index, caption in enumerate(captions):
            picture = {} if images is None else {"image": base64.b64encode(encode_png(thumbnail(images[index]))).decode()}
            self._append(CAPTIONS, {"step": step, **caption, **picture})

    def close(self) -> None:
        """Finishes the wandb mirror."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        line = json.dumps({key: _finite(value) for key, value in record.items()}, ensure_ascii=False)
        try:
            with (self.run_dir / name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            # A full disk costs a line of the log, not the run.
            logger.warning("%s: one record lost: %s", self.run_dir / name, error)

    def _mirror(self, record: Mapping[str, Any], prefix: str) -> None:
        if self._wandb is not None:
            self._wandb.log({f"{prefix}{key}": value for key, value in record.items() if key != "step"}, step=int(record["step"]))

    def _go_back_to(self, resumed_step: int | None) -> None:
        for name in (METRICS, EVAL, CAPTIONS):
            path = self.run_dir / name
            if not path.exists():
                continue
            if resumed_step is None:
                path.replace(path.with_name(f"{name}.old"))
            else:
                _rewrite(path, lambda record: record["step"] <= resumed_step)
        for path in (self.run_dir / SAMPLES).glob("step_*"):
            digits = path.stem.removeprefix("step_")
            if digits.isdecimal() and int(digits) > (-1 if resumed_step is None else resumed_step):
                path.unlink()

    def _write_provenance(self, resumed_step: int | None, wandb_run_id: str | None, session: Mapping[str, Any]) -> str:
        """Adds this start to provenance.json; returns the wandb run id."""
        path = self.run_dir / PROVENANCE
        old = read_json(path) if resumed_step is not None else {}
        run_id = wandb_run_id or old.get("wandb_run_id") or uuid.uuid4().hex[:12]
        now = {"step": resumed_step or 0, "time": time.time(), **session, **provenance(self._config)}
        body = {"name": self._config.name, "wandb_run_id": run_id, "sessions": [*old.get("sessions", []), now]}
        _replace(path, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        return str(run_id)


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that are whole records with a step; [] where there is no file."""
    records = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # half a line, from a kill while it was written
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object; {} where the file is missing or damaged."""
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def start_wandb(config: RunConfig, run_dir: Path, run_id: str) -> Any:
    """Starts or continues a wandb run of this id.

    Raises:
        UserError: wandb is not installed, or refuses (for example online without an account).
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError(f"log.wandb={config.log.wandb}, but wandb is not installed", fix="pip install wandb, or set log.wandb=off") from None
    try:
        return wandb.init(
            project=config.log.wandb_project,
            name=config.name,
            id=run_id,
            resume="allow" if config.log.wandb == "online" else None,
            mode=config.log.wandb,
            dir=str(run_dir),
            config=to_dict(config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_save_requirements=False),
        )
    except Exception as error:  # its own errors share no public base class
        raise UserError("wandb did not start", got=error, fix="log in with `wandb login`, or set log.wandb=offline or off") from None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps whole records that `keep` accepts, atomically."""
    records = [record for record in read_records(path) if keep(record)]
    _replace(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _replace(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
