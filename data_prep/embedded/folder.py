"""Writes an embedded set as the ordinary folder that a user would have: images with `.txt` and `.json` beside them."""

import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_prep.storage import writing

Item = tuple[str, np.ndarray, str, dict[str, Any]]
"""(name without suffix, uint8 [h, w] or [h, w, 3], caption, content of the `.json` or {} for none)."""


def write_folder(folder: Path, items: Iterable[Item], total: int) -> int:
    """Writes all items to a new folder, which appears whole or not at all; returns how many.

    Raises:
        UserError: the disk is full or not writable.
    """
    building = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    written = 0
    try:
        with writing(str(folder)):
            building.mkdir(parents=True)
            for name, pixels, caption, values in tqdm(items, total=total, desc=f"writing {folder.name}", unit="img"):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                (building / f"{name}.png").write_bytes(buffer.getvalue())
                (building / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
                if values:
                    (building / f"{name}.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
                written += 1
            os.replace(building, folder)  # an empty folder may be there; one with files is an error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return written
