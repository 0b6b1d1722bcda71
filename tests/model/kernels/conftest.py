"""Where kernels run in tests: Triton's interpreter on a CPU, and a GPU where there is one."""

import pytest
import torch

from model.kernels.dispatch import has_triton, is_interpreting


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> torch.device:
    """`cpu` in the interpreter, `cuda` under the marker `gpu`; skipped where Triton cannot run."""
    if not has_triton():
        pytest.skip("Triton is not installed")
    if request.param == "cpu" and not is_interpreting():
        pytest.skip("Triton is not interpreting: TRITON_INTERPRET=1 makes it")
    return torch.device(request.param)
