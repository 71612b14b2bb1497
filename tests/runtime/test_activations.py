"""What a scheme makes of activations: the formula, to the bit, on every device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctconvert.runtime import activations
from ctconvert.runtime.kernels.quantize.reference import quantize_per_token_reference
from ctconvert.specs import WeightSpec

K = 256


class ReciprocalDivision(TorchDispatchMode):
    """Division by a plain number as CUDA computes it: times the reciprocal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * (1 / torch.tensor(args[1]))
        return func(*args, **(kwargs or {}))


def spec_of(kind: str) -> WeightSpec:
    whole = kind == "int8"
    block = (128, 128) if kind == "fp8 block" else None
    return WeightSpec(
        format="float-quantized",
        family="w8a8",
        kind="int" if whole else "float",
        bits=8,
        n=128,
        k=K,
        storage="plain",
        element="I8" if whole else "F8_E4M3",
        block=block,
        scale_shape=(1, 2) if block else (128, 1),
        input_type="I8" if whole else "F8_E4M3",
    )


@pytest.mark.parametrize("kind", ["fp8", "fp8 block", "int8"])
@pytest.mark.parametrize(
    ("device", "mode"),
    [
        ("cpu", nullcontext),
        ("cpu", ReciprocalDivision),
        pytest.param("cuda", nullcontext, marks=pytest.mark.gpu),
    ],
    ids=["cpu", "reciprocal", "gpu"],
)
def test_a_scale_is_a_quotient(kind: str, device: str, mode: Callable[[], Any]) -> None:
    """Of tokens whose quotients lie half-way between two codes: one of another scale does not."""
    torch.manual_seed(0)
    # Of all of bfloat16's, the numbers whose product with the reciprocal moves the most codes.
    largest, limit = (143 / 128, 127.0) if kind == "int8" else (49 / 16, 448.0)
    x = ((torch.rand(64, K) * 2 - 1) * largest).bfloat16()
    x[:, ::64] = largest
    quotients = x.float() / (torch.tensor(largest) / limit)
    codes = quotients.round() if kind == "int8" else quotients.to(torch.float8_e4m3fn)
    expected = codes.double() * (torch.tensor(largest) / limit).double()
    assert len(expected.unique()) > 100
    with mode():
        found = activations.eight_bit(spec_of(kind), {}, x.to(device)).cpu()
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        q, scale = quantize_per_token_reference(
            x.to(device), dtype, 128 if kind == "fp8 block" else None
        )
    assert torch.equal(found, expected)
    assert (scale.cpu() == torch.tensor(largest) / limit).all()
    assert torch.equal(q.double().cpu(), codes.double())


@pytest.mark.parametrize("zero", [None, -7])
def test_a_static_scale_and_its_zero_point(zero: int | None) -> None:
    tensors = {"input_scale": torch.tensor([0.5])}
    if zero is not None:
        tensors["input_zero_point"] = torch.tensor([zero], dtype=torch.int8)
    x = torch.tensor([[0.25, 0.75, -0.25, 100.0, -100.0]]).bfloat16()
    low, high = ((-128 - (zero or 0)) / 2, (127 - (zero or 0)) / 2)
    expected = torch.tensor([[0.0, 1.0, 0.0, high, low]]).double()
    assert torch.equal(activations.eight_bit(spec_of("int8"), tensors, x), expected)


def test_what_is_not_quantised_stays() -> None:
    x = torch.randn(3, K).bfloat16()
    for spec in (
        WeightSpec(format="f", family="w8a8", kind="int", bits=8, n=8, k=K, storage="plain"),
        WeightSpec(format="f", family="sparse24", kind="float", bits=16, n=8, k=K, storage="plain"),
    ):
        assert torch.equal(activations.eight_bit(spec, {}, x), x.double())
        assert torch.equal(activations.fake_quantised(spec, {}, x), x.double())
        assert torch.equal(activations.unchanged(spec, {}, x), x.double())
