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


def marlin_tile(bits: int) -> list[int]:
    """Which of a 16 x 64 tile's codes, row after row, stands at each place of Marlin's order."""
    order = []
    for thread in range(32):
        first = [
            16 * row + thread // 4 + 8 * block
            for block in (0, 1)
            for row in (2 * (thread % 4) + step for step in (0, 1, 8, 9))
        ]
        order += [place + 256 * column for column in range(4) for place in first]
    lanes = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    return [order[start + lane] for start in range(0, len(order), len(lanes)) for lane in lanes]


def marlin_qweight(codes: np.ndarray, bits: int) -> torch.Tensor:
    """``qweight`` of [N, K] unsigned codes whose N and K are whole tiles."""
    n, k = codes.shape
    blocks = codes.T.reshape(k // 16, 16, n // 16, 16).transpose(0, 2, 1, 3)
    tiles = blocks.reshape(k // 16, n // 64, 1024)[:, :, marlin_tile(bits)]
    return pack_last(tiles.reshape(k // 16, n * 16), bits)


def marlin_scales(scale: torch.Tensor) -> torch.Tensor:
    """``scales`` of [N, groups]."""
    rows = scale.t()
    if rows.shape[0] == 1:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    else:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    return rows.reshape(-1, len(order))[:, order].reshape(rows.shape)


def marlin_qzeros(zero: np.ndarray, bits: int) -> torch.Tensor:
    """``qzeros`` of [N, groups] unsigned zero points."""
    rows = zero.T
    order = [i + 8 * j for i in range(8) for j in range(8)]
    lanes = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    moved = rows.reshape(-1, 64)[:, order].reshape(-1, len(lanes))[:, lanes]
    return pack_last(moved.reshape(rows.shape), bits)


def mxfp4_scales(scale: torch.Tensor) -> torch.Tensor:
    """``weight_scale`` of [N, K/32] E8M0 bytes."""
    rows = marlin_scales(scale)
    return rows.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(rows.shape)


def framed(values: np.ndarray | torch.Tensor, n: int, k: int) -> np.ndarray:
    """A matrix with zeros below and to the right."""
    found = np.zeros((n, k), dtype=np.asarray(values).dtype)
    found[: values.shape[0], : values.shape[1]] = values
    return found
