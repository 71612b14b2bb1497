"""Plain, slow references for the layouts, element by element, sharing no code with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import safe_open


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, through the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no iterator)
                assert name not in found
                found[name] = opened.get_tensor(name)
    return found


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, dtype and shape included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def unsigned_codes(tensors: dict[str, torch.Tensor], module: str, bits: int) -> np.ndarray:
    """[N, K] unsigned codes of a module, by compressed-tensors' own unpacking."""
    offset = 1 << (bits - 1)
    if f"{module}.weight_packed" not in tensors:
        return tensors[f"{module}.weight"].numpy().astype(np.int64) + offset
    shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
    signed = unpack_from_int32(tensors[f"{module}.weight_packed"], bits, shape)
    return signed.numpy().astype(np.int64) + offset


def unsigned_zero_points(
    tensors: dict[str, torch.Tensor], module: str, bits: int, n: int
) -> np.ndarray | None:
    """[N, groups] unsigned zero points of a module, or None."""
    zero = tensors.get(f"{module}.weight_zero_point")
    if zero is None:
        return None
    if zero.dtype == torch.int32:
        shape = torch.Size((n, zero.shape[1]))
        zero = unpack_from_int32(zero, bits, shape, packed_dim=0)
    return zero.numpy().astype(np.int64) + (1 << (bits - 1))


def pack_last(codes: np.ndarray, bits: int) -> torch.Tensor:
    """i32 words of a code matrix, packed along its last dimension."""
    f = 32 // bits
    rows, columns = codes.shape
    assert columns % f == 0
    words = np.zeros((rows, columns // f), dtype=np.uint64)
    for j in range(f):
        words |= codes[:, j::f].astype(np.uint64) << np.uint64(bits * j)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def triton_wna16(
    tensors: dict[str, torch.Tensor], module: str, bits: int
) -> dict[str, torch.Tensor]:
    """What ``triton-wna16`` should hold for a module of the source."""
    codes = unsigned_codes(tensors, module, bits)
    scale = tensors[f"{module}.weight_scale"]
    n = codes.shape[0]
    if scale.ndim == 1:
        scale = scale.expand(n).reshape(n, 1)
    made = {"qweight": pack_last(codes.T, bits), "scales": scale.t().contiguous()}
    zero = unsigned_zero_points(tensors, module, bits, n)
    if zero is not None:
        made["qzeros"] = pack_last(zero.T, bits)
    return made


def check_against_reference(source: Path, out: Path, bits: dict[str, int]) -> None:
    """Every module equals the reference; every other tensor is the source's own."""
    before, after = load_tensors(source), load_tensors(out)
    expected = {}
    for name, tensor in before.items():
        module, _, local = name.rpartition(".")
        if module not in bits or local == "bias":
            expected[name] = tensor
        elif local in ("input_scale", "output_scale"):
            expected[name] = tensor.float()
    for module, width in bits.items():
        made = triton_wna16(before, module, width)
        expected |= {f"{module}.{local}": tensor for local, tensor in made.items()}
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert equal(after[name], tensor), name
