"""The CPU kernels' layouts: golden vectors, definitions, sums that are checked on the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.naive import GOLDEN, codes_of, placed, random_words, words_of

from ctconvert.transforms.cpu import (
    cpu_int8_pack,
    cpu_int8_unpack,
    cpu_w4a8_group_rows,
    cpu_w4a8_pack,
    cpu_w4a8_ungroup_rows,
    cpu_w4a8_unpack,
    cpu_w4a16_pack,
    cpu_w4a16_unpack,
)

pytest_plugins = ("support.transform_paths",)
pytestmark = pytest.mark.usefixtures("poisoned")

VECTORS = GOLDEN / "cpu_layouts.safetensors"


def zero_points(n: int, groups: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 16, (n, groups), generator=generator).to(torch.uint8)


# --------------------------------------------------------------------------------------- w4a16


def blocked(codes: np.ndarray) -> torch.Tensor:
    n, k = np.indices(codes.shape)
    place = (n // 16) * 16 * codes.shape[1] + k * 16 + n % 16
    return words_of(placed(codes, place), 4).view(codes.shape[0] // 16, 2 * codes.shape[1])


def test_golden_w4a16(either_path: str) -> None:
    golden = load_file(VECTORS)
    words = words_of(golden["cpu_w4a16.codes"].numpy(), 4)
    packed = golden["cpu_w4a16.q"]
    assert torch.equal(cpu_w4a16_pack(words), packed)
    assert torch.equal(cpu_w4a16_unpack(packed, 64, 128), words)


def test_w4a16_is_what_the_kernel_computes() -> None:
    golden = load_file(VECTORS)
    codes = codes_of(cpu_w4a16_unpack(golden["cpu_w4a16.q"], 64, 128), 4)
    scale = golden["cpu_w4a16.scale"].float().repeat_interleave(32, 1)
    weight = (torch.from_numpy(codes.astype(np.float32)) - 8) * scale
    expected = golden["cpu_w4a16.x"].float() @ weight.t()
    assert (golden["cpu_w4a16.y"].float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(("n", "k"), [(32, 32), (96, 224)])
def test_w4a16_is_the_definition(n: int, k: int, either_path: str) -> None:
    words = random_words(n, k, 4)
    packed = blocked(codes_of(words, 4))
    assert torch.equal(cpu_w4a16_pack(words), packed)
    assert torch.equal(cpu_w4a16_unpack(packed, n, k), words)


@pytest.mark.parametrize(("n", "k"), [(288, 4160), (32, 8224), (672, 32)])
def test_w4a16_blocks_of_every_size(n: int, k: int) -> None:
    words = random_words(n, k, 4)
    packed = blocked(codes_of(words, 4))
    assert torch.equal(cpu_w4a16_pack(words), packed)
    assert torch.equal(cpu_w4a16_unpack(packed, n, k), words)


def test_w4a16_refuses() -> None:
    words = torch.zeros((32, 4), dtype=torch.int32)
    for bad, message in (
        (words.to(torch.int64), r"2-D torch\.int32"),
        (words[:16], "N = 16"),
        (words[:, :3], "K = 24"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_w4a16_pack(bad)
    with pytest.raises(ValueError, match=r"must be \[2, 64\], not \[32, 4\]"):
        cpu_w4a16_unpack(words, 32, 32)


# ---------------------------------------------------------------------------------------- w4a8


def byte_blocks(codes: np.ndarray, zeros: np.ndarray) -> torch.Tensor:
    """Byte by byte, as the description of a block says."""
    n, k = codes.shape
    group = k // zeros.shape[1]
    size = min(128, group)
    out = np.zeros((n // 32, k // size, 16 * size + 128), dtype=np.uint8)
    for block in range(n // 32):
        for column in range(k // size):
            part = codes[block * 32 : block * 32 + 32, column * size : column * size + size]
            at = 0
            for k4 in range(size // 4):
                for h in range(2):
                    for ni in range(8):
                        for ki in range(4):
                            low = part[16 * h + ni, 4 * k4 + ki]
                            high = part[16 * h + 8 + ni, 4 * k4 + ki]
                            out[block, column, at] = low | high << 4
                            at += 1
            zero = zeros[block * 32 : block * 32 + 32, column * size // group].astype(np.int64)
            sums = part.astype(np.int64).sum(1) - size * zero
            out[block, column, at:] = sums.astype(np.int32).view(np.uint8)
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    ("n", "k", "g"), [(32, 64, 32), (64, 256, 128), (64, 256, 64), (64, 512, 256), (96, 96, 32)]
)
def test_golden_w4a8(n: int, k: int, g: int, either_path: str) -> None:
    golden = load_file(VECTORS)
    start = f"cpu_w4a8.N{n}.K{k}.G{g}."
    words, zeros = words_of(golden[start + "codes"].numpy(), 4), golden[start + "zeros"]
    packed = golden[start + "w"]
    assert torch.equal(cpu_w4a8_pack(words, zeros), packed)
    assert torch.equal(cpu_w4a8_unpack(packed, zeros, n, k), words)
    assert torch.equal(cpu_w4a8_group_rows(zeros).to(torch.int8), golden[start + "z"])
    scale = golden[start + "scale"]
    assert torch.equal(cpu_w4a8_group_rows(scale.to(torch.float32)), golden[start + "s"])
    assert torch.equal(cpu_w4a8_ungroup_rows(golden[start + "s"]).to(torch.bfloat16), scale)


def test_golden_w4a8_experts() -> None:
    golden = {
        name.removeprefix("cpu_w4a8_moe."): tensor
        for name, tensor in load_file(VECTORS).items()
        if name.startswith("cpu_w4a8_moe.")
    }
    zeros = torch.full((64, 4), 8, dtype=torch.uint8)
    for expert in range(2):
        words = words_of(golden["codes"][expert].numpy(), 4)
        assert torch.equal(cpu_w4a8_pack(words, zeros), golden["w"][expert])
        assert torch.equal(cpu_w4a8_unpack(golden["w"][expert], zeros, 64, 128), words)
        assert torch.equal(cpu_w4a8_group_rows(zeros).to(torch.int8), golden["z"][expert])
        scale = golden["scale"][expert].to(torch.float32)
        assert torch.equal(cpu_w4a8_group_rows(scale), golden["s"][expert])


@pytest.mark.parametrize(("n", "k", "groups"), [(32, 96, 1), (96, 384, 1), (64, 320, 5)])
def test_w4a8_is_the_definition(n: int, k: int, groups: int, either_path: str) -> None:
    words, zeros = random_words(n, k, 4), zero_points(n, groups)
    packed = byte_blocks(codes_of(words, 4), zeros.numpy())
    assert torch.equal(cpu_w4a8_pack(words, zeros), packed)
    assert torch.equal(cpu_w4a8_unpack(packed, zeros, n, k), words)


@pytest.mark.parametrize("code", [0, 15])
def test_w4a8_sums_do_not_overflow(code: int) -> None:
    words = words_of(np.full((32, 256), code, dtype=np.uint8), 4)
    zeros = torch.full((32, 2), 15 - code, dtype=torch.uint8)
    sums = cpu_w4a8_pack(words, zeros)[..., 2048:].contiguous().view(torch.int32)
    assert (sums == 128 * (code - (15 - code))).all()


@pytest.mark.parametrize(("n", "k", "groups"), [(320, 2304, 18), (32, 4224, 33), (608, 64, 2)])
def test_w4a8_blocks_of_every_size(n: int, k: int, groups: int) -> None:
    words, zeros = random_words(n, k, 4), zero_points(n, groups)
    packed = byte_blocks(codes_of(words, 4), zeros.numpy())
    assert torch.equal(cpu_w4a8_pack(words, zeros), packed)
    assert torch.equal(cpu_w4a8_unpack(packed, zeros, n, k), words)


def test_w4a8_refuses() -> None:
    words, zeros = torch.zeros((32, 16), dtype=torch.int32), torch.zeros((32, 4), dtype=torch.uint8)
    for bad, zero, message in (
        (words.to(torch.int64), zeros, r"2-D torch\.int32"),
        (words[:16], zeros[:16], "N = 16"),
        (words, zeros[:16], r"torch\.uint8 \[32, groups\]"),
        (words, zeros.to(torch.int8), r"torch\.uint8 \[32, groups\]"),
        (words, torch.zeros((32, 8), dtype=torch.uint8), "multiple of 32 columns"),
        (words, torch.zeros((32, 3), dtype=torch.uint8), "multiple of 32 columns"),
        (
            torch.zeros((32, 40), dtype=torch.int32),
            torch.zeros((32, 2), dtype=torch.uint8),
            "no multiple of the block of 128",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_w4a8_pack(bad, zero)
    packed = cpu_w4a8_pack(words, zeros)
    with pytest.raises(ValueError, match=r"must be torch\.uint8 \[1, 2, 640\]"):
        cpu_w4a8_unpack(packed, zeros[:, :2], 32, 64)
    for at in (0, 511, 512, 639):  # a code, a sum
        wrong = packed.clone()
        wrong[0, 2, at] += 1
        with pytest.raises(ValueError, match=r"row \d+, columns from 64: the sum"):
            cpu_w4a8_unpack(wrong, zeros, 32, 128)
    with pytest.raises(ValueError, match=r"N % 32"):
        cpu_w4a8_group_rows(torch.zeros((16, 2)))
    with pytest.raises(ValueError, match="groups, 32"):
        cpu_w4a8_ungroup_rows(torch.zeros((16, 2)))


# ---------------------------------------------------------------------------------------- int8


def int8_blocks(values: np.ndarray) -> torch.Tensor:
    n, k = values.shape
    rows = []
    for block in range(0, n, 32):
        part = values[block : block + 32]
        rows += [part[:, k4 : k4 + 4].reshape(-1) for k4 in range(0, k, 4)]
        rows.append((part.astype(np.int64).sum(1) * 128).astype(np.int32).view(np.int8))
    return torch.from_numpy(np.concatenate(rows).reshape(n, k + 4))


def random_int8(n: int, k: int) -> torch.Tensor:
    return random_words(n, k, 8).view(torch.int8)


@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 128), (96, 256)])
def test_golden_int8(n: int, k: int, either_path: str) -> None:
    golden = load_file(VECTORS)
    values, packed = golden[f"int8_amx.N{n}.K{k}.in"], golden[f"int8_amx.N{n}.K{k}.out"]
    assert torch.equal(cpu_int8_pack(values), packed)
    assert torch.equal(cpu_int8_unpack(packed, n, k), values)


@pytest.mark.parametrize(("n", "k"), [(32, 96), (96, 64)])
def test_int8_is_the_definition(n: int, k: int, either_path: str) -> None:
    values = random_int8(n, k)
    packed = int8_blocks(values.numpy())
    assert torch.equal(cpu_int8_pack(values), packed)
    assert torch.equal(cpu_int8_unpack(packed, n, k), values)


@pytest.mark.parametrize(("n", "k"), [(320, 2080), (32, 4256), (608, 32)])
def test_int8_blocks_of_every_size(n: int, k: int) -> None:
    values = random_int8(n, k)
    packed = int8_blocks(values.numpy())
    assert torch.equal(cpu_int8_pack(values), packed)
    assert torch.equal(cpu_int8_unpack(packed, n, k), values)


@pytest.mark.parametrize("value", [-128, 127])
def test_int8_sums_do_not_overflow(value: int) -> None:
    values = torch.full((32, 65536), value, dtype=torch.int8)
    sums = cpu_int8_pack(values).view(-1)[-128:].view(torch.int32)
    assert (sums == 128 * 65536 * value).all()


def test_any_memory() -> None:
    values = random_int8(32, 64)
    odd = torch.zeros(32 * 64 + 1, dtype=torch.int8)[1:].view(32, 64).copy_(values)
    packed = cpu_int8_pack(values)
    assert torch.equal(cpu_int8_pack(odd), packed)
    assert torch.equal(cpu_int8_pack(values.t().contiguous().t()), packed)
    odd = torch.zeros(32 * 68 + 1, dtype=torch.int8)[1:].view(32, 68).copy_(packed)
    assert torch.equal(cpu_int8_unpack(odd, 32, 64), values)


def test_int8_refuses() -> None:
    values = torch.zeros((32, 64), dtype=torch.int8)
    for bad, message in (
        (values.to(torch.uint8), r"2-D torch\.int8"),
        (values[:16], "N = 16"),
        (values[:, :48], "K = 48"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_int8_pack(bad)
    packed = cpu_int8_pack(values)
    with pytest.raises(ValueError, match=r"must be torch\.int8 \[32, 36\]"):
        cpu_int8_unpack(packed, 32, 32)
    for at in (0, 2047, 2048, 2175):
        wrong = packed.clone()
        wrong.view(-1)[at] += 1
        with pytest.raises(ValueError, match=r"row \d+: the sum"):
            cpu_int8_unpack(wrong, 32, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(32, 128), (4096, 4096), (1024, 14336), (28672, 8192)])
def test_gpu(n: int, k: int) -> None:
    words, values = random_words(n, k, 4), random_int8(n, k)
    packed = cpu_w4a16_pack(words)
    assert torch.equal(cpu_w4a16_pack(words.cuda()).cpu(), packed)
    assert torch.equal(cpu_w4a16_unpack(packed.cuda(), n, k).cpu(), words)
    for groups in (1, k // 128, k // 32):
        zeros = zero_points(n, groups)
        packed = cpu_w4a8_pack(words, zeros)
        assert torch.equal(cpu_w4a8_pack(words.cuda(), zeros.cuda()).cpu(), packed)
        assert torch.equal(cpu_w4a8_unpack(packed.cuda(), zeros.cuda(), n, k).cpu(), words)
    packed = cpu_int8_pack(values)
    assert torch.equal(cpu_int8_pack(values.cuda()).cpu(), packed)
    assert torch.equal(cpu_int8_unpack(packed.cuda(), n, k).cpu(), values)
