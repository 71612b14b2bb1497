"""What a kernel's launcher asks of a device."""

from __future__ import annotations

import torch


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
