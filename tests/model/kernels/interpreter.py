"""Triton's interpreter as the tests need it: it rounds as a GPU does, and lives with newer numpy."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from model.kernels.dispatch import is_interpreting, triton_version


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


@contextmanager
def arrays_of_one_as_indices() -> Iterator[None]:
    """Triton up to 3.6 asks numpy for the int of an array of one element, which numpy refuses from 2.4 on."""
    if not is_interpreting() or triton_version() > (3, 6):
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    with mock.patch.object(interpreter, "_patch_lang_tensor", patch_and_mend):
        yield
