"""The devices a transform can run on, through torch's device API."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ctconvert.errors import UsageError

#: Accelerators whose Triton kernels the transforms use, in the order ``auto`` tries them.
ACCELERATORS = ("cuda", "xpu")


def resolve(name: str) -> torch.device:
    """The device of a ``--device`` argument: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.

    Raises:
        UsageError: it is unknown, or this machine or this torch build does not have it.
    """
    if name == "auto":
        name = next((kind for kind in ACCELERATORS if _count(kind)), "cpu")
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind not in ACCELERATORS or (":" in name and not index.isdecimal()):
        raise UsageError(f"unknown device {name!r}; the devices are auto, cpu, cuda[:i], xpu[:i]")
    count = _count(kind)
    if count == 0:
        raise UsageError(
            f"--device {name}: torch {torch.__version__} sees no {kind} device here; use "
            "--device cpu"
        )
    if int(index or 0) >= count:
        raise UsageError(f"--device {name}: there are {count} {kind} devices, counted from 0")
    return torch.device(kind, int(index or 0))


def every(name: str) -> tuple[torch.device, ...]:
    """The devices that share work: all of a kind that is named without an index.

    Raises:
        UsageError: as :func:`resolve`.
    """
    first = resolve(name)
    if first.type == "cpu" or ":" in name:
        return (first,)
    return tuple(torch.device(first.type, index) for index in range(_count(first.type)))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, where one of a device is in pinned memory, which torch uses again."""
    if tensor.device.type == "cpu":
        return tensor
    made = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return made.copy_(tensor)


def _count(kind: str) -> int:
    backend = getattr(torch, kind, None)
    return int(backend.device_count()) if backend is not None and backend.is_available() else 0


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue; nothing on the CPU."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Makes a device current: Triton launches on the current one, whatever its tensors are on."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = torch.get_device_module(device).device(device)
    return context


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left.

    The CPU's allocator raises RuntimeError, and so does what a device's driver refuses: pinned
    memory, or a place beside programs that have all of the device.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = ("can't allocate memory", "Storage size calculation overflowed", ": out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
