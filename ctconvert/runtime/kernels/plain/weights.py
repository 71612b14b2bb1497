"""The weights of layouts whose kernels are not here: from their tensors, by plain indexing.

Written from what the kernels read, not from the transforms that write it: each tensor is seen as
the blocks it is made of, and the blocks' axes are put in the order of N and K.
"""

from __future__ import annotations

import torch


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """i32 [..., C] to codes i32 [..., C * 32 / bits], low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _by_columns(per_group: torch.Tensor, k: int) -> torch.Tensor:
    """[K/G, N] to [N, K]."""
    return per_group.t().repeat_interleave(k // per_group.shape[0], dim=1)


#: Bits of a code's place in a block of 64 x 16, the lowest first: bit i of n or k, by b.
_MACHETE = {
    4: ("n3", "k3", "k0", "k4", "k5", "k1", "k2", "n0", "n1", "n2"),
    8: ("k0", "n3", "k3", "k4", "k5", "k1", "k2", "n0", "n1", "n2"),
}


def machete(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """f32 [N, K] of i32 [K*b/32, N]: blocks of 64 of K, then of 16 of N, then ten bits of both.

    ``zeros`` [K/G, N] are what the kernel adds to code * scale.
    """
    n, k = qweight.shape[1], qweight.shape[0] * 32 // bits
    place = torch.arange(1024, device=qweight.device)
    at = {"n": torch.zeros_like(place), "k": torch.zeros_like(place)}
    for bit, name in enumerate(_MACHETE[bits]):
        at[name[0]] += (place >> bit & 1) << int(name[1])
    blocks = unpacked(qweight.flatten(), bits).view(k // 64, n // 16, 1024)
    codes = torch.empty((k // 64, n // 16, 16, 64), dtype=torch.int32, device=qweight.device)
    codes[:, :, at["n"], at["k"]] = blocks
    codes = codes.permute(1, 2, 0, 3).reshape(n, k)
    scale = _by_columns(scales.float(), k)
    if zeros is None:
        return (codes - (1 << (bits - 1))).float() * scale
    return codes.float() * scale + _by_columns(zeros.float(), k)


def w4a8_fp8(
    weight: torch.Tensor, weight_chan_scale: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """f32 [N, K] of i32 [N, K/8], f32 [N, 1] and f8_e4m3 [K/128 * N * 8].

    A nibble's lower three bits are the place in the group's eight multiples -8 .. -1 of its scale;
    without its top bit it means minus that, and 0 is 0.
    """
    n, k = weight.shape[0], weight.shape[1] * 8
    rows = torch.arange(n, device=weight.device)[:, None]
    columns = torch.arange(k, device=weight.device)[None, :]
    place = 512 * (rows // 16 + n // 16 * (columns // 32))
    place = place + 16 * (columns // 4 % 4 + 4 * (rows % 8)) + columns % 4
    place = place + 4 * (rows // 8 % 2) + 8 * (columns // 16 % 2)
    nibbles = unpacked(weight.flatten(), 4)[place].long()
    table = weight_scale.view(torch.float8_e4m3fn).float().view(k // 128, n, 8)
    values = table[columns // 128, rows, nibbles & 7]
    values = torch.where(nibbles >= 8, values, -values)
    return torch.where(nibbles == 0, 0.0, values) * weight_chan_scale


def cpu_w4a16(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor | None
) -> torch.Tensor:
    """f32 [N, K] of i32 [N/16, 2*K]: of 16 channels, a word for each column and eight of them."""
    blocks, k = qweight.shape[0], qweight.shape[1] // 2
    codes = unpacked(qweight.view(blocks, k, 2), 4)
    codes = codes.permute(0, 2, 1).reshape(blocks * 16, k)
    zeros: torch.Tensor | int = 8
    if qzeros is not None:
        zeros = _by_columns(unpacked(qzeros, 4), k)
    return (codes - zeros).float() * _by_columns(scales.float(), k)


def cpu_w4a8(qweight: torch.Tensor, qzeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(code - zero i32 [N, K], sums of them i32 [N, K/B]) of u8 [N/32, K/B, 16*B + 128].

    A byte of (4 columns, 16 channels, 8 channels, column) has two codes, eight channels apart.
    ``qzeros`` are i8 [N/32, K/G, 32].
    """
    blocks, steps, size = qweight.shape
    columns = (size - 128) // 16
    data = qweight[..., :-128].reshape(blocks, steps, columns // 4, 2, 8, 4)
    codes = torch.stack((data & 15, data >> 4), dim=4).int()  # block, step, k4, h, half, ni, ki
    codes = codes.permute(0, 3, 4, 5, 1, 2, 6).reshape(blocks * 32, steps * columns)
    zeros = qzeros.int().transpose(1, 2).flatten(0, 1)
    codes = codes - zeros.repeat_interleave(steps * columns // zeros.shape[1], dim=1)
    sums = qweight[..., -128:].contiguous().view(torch.int32)  # block, step, channel
    return codes, sums.transpose(1, 2).flatten(0, 1)


def cpu_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q i8 [N, K], 128 times their sums i32 [N]) of i8 [N, K + 4].

    Of 32 channels, four columns of each in turn, then the sums.
    """
    n, k = weight.shape[0], weight.shape[1] - 4
    blocks = weight.reshape(n // 32, 32 * (k + 4))
    values = blocks[:, : 32 * k].reshape(n // 32, k // 4, 32, 4).transpose(1, 2)
    sums = blocks[:, 32 * k :].contiguous().view(torch.int32)
    return values.reshape(n, k), sums.flatten()
