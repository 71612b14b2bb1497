"""What the ops on Marlin tiles ask of their arguments."""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.marlin.forms import FORMS
from ctconvert.runtime.kernels.marlin.reference import group_rows
from ctconvert.runtime.kernels.ops import check_last, check_tensor

_FLOATS = (torch.float16, torch.bfloat16)
_SCALES = {
    "float": (*_FLOATS, torch.float32),
    "e8m0": (torch.uint8, torch.float8_e8m0fnu),
    "e5m3": (torch.uint8,),
    "e4m3": (torch.uint8, torch.float8_e4m3fn),
}


def check_activations(
    x: torch.Tensor, bias: torch.Tensor | None, n: int, k: int, lead: tuple[int, ...] = ()
) -> None:
    """Raise TypeError or ValueError where x is not f16 or bf16 [..., K], the bias [*lead, N]."""
    check_tensor("x", x, dtypes=_FLOATS)
    check_last("x", x, k)
    if bias is not None:
        check_tensor("bias", bias, dtypes=(x.dtype,), shape=(*lead, n), device=x.device)


def check_weight(
    device: torch.device,
    lead: tuple[int, ...],
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    factor: torch.Tensor | None,
    form: str,
    n: int,
    k: int,
    group_size: int,
    names: tuple[str, ...] = ("weight", "scale", "zeros", "factor"),
) -> None:
    """Raise where the tensors, of which ``lead`` are stacked, are not of the form.

    ``names`` are what the op calls them.

    Raises:
        TypeError, ValueError: as ``marlin_tiles_gemm``.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form}")
    if n <= 0 or n % 64:
        raise ValueError(f"n must be a positive multiple of 64 (a tile's columns), got {n}")
    if k <= 0 or k % 16:
        raise ValueError(f"k must be a positive multiple of 16 (a tile's rows), got {k}")
    found = FORMS[form]
    if found.group is not None and k % found.group:
        raise ValueError(f"k must be a multiple of {found.group}, a group of {form}, got {k}")
    if found.group is not None and group_size != found.group:
        raise ValueError(f"group_size must be {found.group} for {form}, got {group_size}")
    rows = group_rows(group_size, k)
    if rows <= 0 or rows % 16 or k % rows:
        raise ValueError(
            f"group_size must be -1 (channel-wise) or a multiple of 16 that divides k = {k}, "
            f"got {group_size}"
        )
    int32 = (torch.int32,)
    shape = (*lead, k // 16, n * found.bits // 2)
    check_tensor(names[0], weight, dtypes=int32, shape=shape, device=device)
    dtypes = _FLOATS if any(found.powers) else _SCALES[found.scales]
    check_tensor(names[1], scale, dtypes=dtypes, shape=(*lead, k // rows, n), device=device)
    if zeros is not None:
        if found.zeros is None:
            raise ValueError(f"{names[2]} must be None for {form}")
        shape = (*lead, k // rows, n * found.bits // 32)
        check_tensor(names[2], zeros, dtypes=int32, shape=shape, device=device)
    if (factor is None) != (found.power is None):
        raise ValueError(
            f"{names[3]} must {'be None' if found.power is None else 'be given'} for {form}"
        )
    if factor is not None:
        check_tensor(names[3], factor, dtypes=(torch.float32,), shape=(*lead, 1), device=device)
