"""Triton's interpreter truncates fp32 to bf16 where a GPU rounds to the nearest: under this it rounds."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from model.kernels.dispatch import is_interpreting


@contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """Casts from fp32 to bf16 round as torch's do, and as those of compiled kernels."""
    if not is_interpreting():
        yield
        return
    interpreter, language = importlib.import_module("triton.runtime.interpreter"), importlib.import_module("triton.language")
    convert = interpreter._convert_float

    def convert_rounded(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == language.bfloat16 and target == language.float32:  # exact either way; the interpreter's own takes a millisecond
            return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32).reshape(values.shape) << 16
        if source != language.float32 or target != language.bfloat16:
            return convert(values, source, target, rounding_mode)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy())
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    with mock.patch.object(interpreter, "_convert_float", convert_rounded):
        yield
