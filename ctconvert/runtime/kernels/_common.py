"""Argument checks and device properties that the kernels share."""

from collections.abc import Sequence

import torch


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


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of an NVIDIA or AMD GPU, or their like elsewhere."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 1


def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a block gets 160 KiB of shared memory: A100, H100, B200, not AMD or Intel GPUs."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return int(getattr(properties, "shared_memory_per_block_optin", 0)) >= 160 * 1024
    return False
