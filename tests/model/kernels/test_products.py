"""Products of half precision with fp32 sums: each way to them, by what the installed torch can do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels import products
from model.kernels.products import add_product, widened_product

HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.addmm.overloads()


def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((37, 12), (12, 21)))
    return left, right, torch.randn(37, 21, generator=generator)


def library(*, adds: bool) -> dict[str, Callable[..., Tensor]]:
    """torch's products on CUDA, with what they refuse: before 2.10 a sum that is not of the factors' dtype."""
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, **rest: Any) -> Tensor:
        return mm(left.to(out_dtype), right.to(out_dtype), **rest)

    def wide_addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if out_dtype is None:
            return addmm(total, left, right, **rest)
        if not adds and total.dtype != right.dtype:
            raise RuntimeError(f"self and mat2 must have the same dtype, but got {total.dtype} and {right.dtype}")
        return addmm(total, left.to(out_dtype), right.to(out_dtype), **rest)

    return {"mm": wide_mm, "addmm": wide_addmm}


@pytest.mark.parametrize("slice_bytes", [64 * 2**20, 1000])
@pytest.mark.parametrize("torch_can", ["nothing", "widen", "add"])
def test_sums_stay_in_fp32_whatever_torch_can_do(torch_can: str, slice_bytes: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    left, right, start = factors(torch.bfloat16)
    expected = left.float() @ right.float()
    monkeypatch.setattr(products, "_SLICE_BYTES", slice_bytes)
    if torch_can != "nothing":
        monkeypatch.setattr(products, "_widens_itself", lambda factor: True)
        for name, function in library(adds=torch_can == "add").items():
            monkeypatch.setattr(torch, name, function)
        products._adds_widened.cache_clear()
        assert products._adds_widened(left.device) == (torch_can == "add")
    total, overwritten = start.clone(), torch.full_like(start, float("nan"))
    add_product(total, left, right)
    add_product(overwritten, left, right, accumulate=False)
    products._adds_widened.cache_clear()
    torch.testing.assert_close(widened_product(left, right), expected)
    torch.testing.assert_close(total, start + expected)
    torch.testing.assert_close(overwritten, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_factors_keep_their_dtype(dtype: torch.dtype) -> None:
    left, right, start = factors(dtype)
    total = start.to(dtype, copy=True)
    add_product(total, left, right)
    torch.testing.assert_close(total, start.to(dtype) + left @ right)
    assert widened_product(left, right).dtype == dtype


@pytest.mark.skipif(not HAS_OUT_DTYPE, reason="torch before 2.8")
def test_torch_takes_the_arguments_as_they_are_given() -> None:
    """No kernel of a CPU has this dtype, so that the dispatcher refuses; a wrong argument would be refused before it, by a TypeError."""
    left, right, total = factors(torch.bfloat16)
    calls: list[Callable[[], Tensor]] = [
        lambda: torch.mm(left, right, out_dtype=torch.float32),
        lambda: torch.mm(left, right, out_dtype=torch.float32, out=total),
        lambda: torch.addmm(total, left, right, out_dtype=torch.float32, out=total),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"aten::(add)?mm\.dtype"):
            call()
    products._adds_widened.cache_clear()
    assert not products._adds_widened(left.device)
    products._adds_widened.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_on_a_gpu(dtype: torch.dtype) -> None:
    left, right, start = (x.cuda() for x in factors(dtype))
    expected = left.double() @ right.double()
    total, overwritten = start.clone(), torch.full_like(start, float("nan"))
    add_product(total, left, right)
    add_product(overwritten, left, right, accumulate=False)
    for found, truth in ((total, start + expected), (overwritten, expected), (widened_product(left, right), expected)):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
