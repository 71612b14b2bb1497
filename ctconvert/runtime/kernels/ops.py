"""How an operation is given to torch: one declaration makes the op, its fake and its CPU path."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Defined straight in the dispatcher: the custom_op decorator adds host time to every call, which
# a kernel of ten microseconds feels wherever no CUDA graph hides it.
_LIBRARY = torch.library.Library("ctconvert", "FRAGMENT")


class Result(NamedTuple):
    """Shape and dtype of a tensor that an op returns, on the device of its first argument."""

    shape: Sequence[int]
    dtype: torch.dtype


def op(
    reference: Callable[P, R], kernel: str
) -> Callable[[Callable[P, Result | tuple[Result, ...]]], Callable[P, R]]:
    """Makes a declaration the op ``ctconvert::NAME``, where NAME is the declaration's.

    The declaration's body checks the arguments, whose first is a tensor, and says what will be
    returned. It runs on every call and when torch traces one, so it reads no tensor's values.

    Args:
        reference: the op in plain torch, of the same signature: what runs on the CPU.
        kernel: ``module:function`` of the same signature, imported at the first call elsewhere.

    Returns:
        the decorator: it returns a function that calls the op, with ``reference`` and ``kernel``
        as attributes.
    """

    def decorate(declared: Callable[P, Result | tuple[Result, ...]]) -> Callable[P, R]:
        name = declared.__name__
        module_name, function = kernel.split(":")

        @functools.cache
        def module() -> ModuleType:
            return importlib.import_module(module_name)

        def run(*args: Any, **options: Any) -> Any:
            declared(*args, **options)
            if args[0].device.type == "cpu":
                return reference(*args, **options)
            return getattr(module(), function)(*args, **options)

        def fake(*args: Any, **options: Any) -> Any:
            made = declared(*args, **options)
            if isinstance(made, Result):
                return args[0].new_empty(made.shape, dtype=made.dtype)
            return tuple(args[0].new_empty(one.shape, dtype=one.dtype) for one in made)

        _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ctconvert::{name}", fake, lib=_LIBRARY)
        overload = getattr(torch.ops.ctconvert, name).default

        @functools.wraps(declared)
        def call(*args: P.args, **options: P.kwargs) -> R:
            made: R = overload(*args, **options)
            return made

        call.reference, call.kernel = reference, kernel  # type: ignore[attr-defined]
        return call

    return decorate


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise where a kernel cannot take ``tensor``, naming the argument.

    ``shape`` gives each dimension's size, None where any will do. The tensor must be contiguous.

    Raises:
        TypeError: not a tensor, or not one of ``dtypes``.
        ValueError: another shape, another device, or not contiguous.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if shape is not None:
        fits = tensor.dim() == len(shape) and all(
            want is None or size == want for size, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the first argument on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_last(name: str, x: torch.Tensor, size: int) -> None:
    """Raise ValueError where x is not [..., size]."""
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} must have shape [..., {size}], got {list(x.shape)}")
