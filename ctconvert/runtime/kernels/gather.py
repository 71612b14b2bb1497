"""Look-up in a quantised embedding (the ``gather`` layout): only the rows asked for are unpacked.

Before (V = rows of the table, H = hidden size, G = H / groups, b = bits):

    weight_packed      i32 [V, words]   codes of a row, low bits first
                       dense:  code k is bits b*k .. b*k + b-1 of the row's bit string, across
                               two words where it falls so; words = ceil(H*b / 32)
                       padded: floor(32/b) codes a word, the top bits unused;
                               words = ceil(H / floor(32/b))
    weight_scale       [V, groups]      groups = 1 (channel-wise) or H/G
    weight_zero_point  u8 [V, groups]   codes, asymmetric only; zero = 2**(b-1) otherwise

After: out[..., h] = (code[id, h] - zero[id, h // G]) * scale[id, h // G] in the scale's dtype.

That is what compressed-tensors' ``dequantize`` computes: it casts code and zero point to the
scale's dtype (exact: both fit in 8 bits), subtracts (exact), multiplies and rounds once. Here the
product is formed in float32 and rounded once, which is the same value. The dense packing is that
of compressed-tensors 0.18 and newer, the padded one that of 0.17 and older and of vLLM's
``CompressedTensorsEmbeddingWNA16Int``.
"""

import torch

from ctconvert.runtime.kernels._common import check_tensor

_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def packed_words(hidden: int, bits: int, packing: str) -> int:
    """Words of one row of the table; ``packing`` is "dense" or "padded"."""
    if packing == "dense":
        return -(-hidden * bits // 32)
    return -(-hidden // (32 // bits))


def embedding_gather_reference(
    ids: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    *,
    bits: int,
    hidden: int,
    packing: str = "dense",
    check: bool = True,
) -> torch.Tensor:
    """:func:`embedding_gather` in plain torch."""
    if check:
        _check_range(ids, weight_packed.shape[0])
    flat = ids.reshape(-1).long()
    known = (flat >= 0) & (flat < weight_packed.shape[0])
    rows = torch.zeros((flat.numel(), weight_packed.shape[1]), dtype=torch.int64)
    rows = rows.to(ids.device)
    rows[known] = weight_packed[flat[known]].long() & 0xFFFFFFFF

    k = torch.arange(hidden, device=ids.device)
    if packing == "dense":
        word, shift = bits * k // 32, bits * k % 32
    else:
        word, shift = k // (32 // bits), bits * (k % (32 // bits))
    following = (word + 1).clamp(max=rows.shape[1] - 1)
    pair = rows[:, word] | (rows[:, following] << 32)
    codes = (pair >> shift) & ((1 << bits) - 1)

    size = hidden // weight_scale.shape[1]
    scale = torch.full(
        (flat.numel(), weight_scale.shape[1]), torch.nan, dtype=torch.float32, device=ids.device
    )
    scale[known] = weight_scale[flat[known]].float()
    zero = torch.full_like(scale, 1 << (bits - 1))
    if weight_zero_point is not None:
        zero[known] = weight_zero_point[flat[known]].float()
    out = codes.float() - zero.repeat_interleave(size, dim=1)
    out *= scale.repeat_interleave(size, dim=1)
    return out.to(weight_scale.dtype).reshape(*ids.shape, hidden)


def _check_range(ids: torch.Tensor, rows: int) -> None:
    """Raise IndexError for an id outside the table. Waits for the device: not while capturing."""
    if ids.numel() == 0:
        return
    if ids.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= rows:
        raise IndexError(f"ids reach from {low} to {high}, the table has rows 0 to {rows - 1}")


def _check(
    ids: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    bits: int,
    hidden: int,
    packing: str,
) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2..8, got {bits}")
    if packing not in ("dense", "padded"):
        raise ValueError(f'packing must be "dense" or "padded", got {packing!r}')
    if hidden <= 0:
        raise ValueError(f"hidden must be positive, got {hidden}")
    check_tensor("ids", ids, dtypes=(torch.int64, torch.int32))
    device = ids.device
    words = packed_words(hidden, bits, packing)
    check_tensor(
        "weight_packed", weight_packed, dtypes=(torch.int32,), shape=(None, words), device=device
    )
    rows = weight_packed.shape[0]
    check_tensor("weight_scale", weight_scale, dtypes=_SCALES, shape=(rows, None), device=device)
    groups = weight_scale.shape[1]
    if groups == 0 or hidden % groups:
        raise ValueError(f"weight_scale has {groups} groups, which do not divide hidden = {hidden}")
    if weight_zero_point is not None:
        check_tensor(
            "weight_zero_point",
            weight_zero_point,
            dtypes=(torch.uint8,),
            shape=(rows, groups),
            device=device,
        )


@torch.library.custom_op("ctconvert::embedding_gather", mutates_args=())
def _embedding_gather_op(
    ids: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    bits: int,
    hidden: int,
    packing: str,
    check: bool,
) -> torch.Tensor:
    _check(ids, weight_packed, weight_scale, weight_zero_point, bits, hidden, packing)
    if ids.device.type == "cpu":
        return embedding_gather_reference(
            ids,
            weight_packed,
            weight_scale,
            weight_zero_point,
            bits=bits,
            hidden=hidden,
            packing=packing,
            check=check,
        )
    from ctconvert.runtime.kernels import gather_triton

    if check:
        _check_range(ids, weight_packed.shape[0])
    return gather_triton.gather(
        ids, weight_packed, weight_scale, weight_zero_point, bits, hidden, packing
    )


@_embedding_gather_op.register_fake
def _(
    ids: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    bits: int,
    hidden: int,
    packing: str,
    check: bool,
) -> torch.Tensor:
    _check(ids, weight_packed, weight_scale, weight_zero_point, bits, hidden, packing)
    return weight_scale.new_empty((*ids.shape, hidden))


def embedding_gather(
    ids: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    *,
    bits: int,
    hidden: int,
    packing: str = "dense",
    check: bool = True,
) -> torch.Tensor:
    """Rows of a quantised embedding, dequantised: the ``gather`` layout.

    The custom op is ``ctconvert::embedding_gather``. On a CPU it is
    :func:`embedding_gather_reference`; elsewhere a Triton kernel. Offsets are 64-bit.

    An id outside the table is an error: with ``check`` the smallest and largest id are read back
    before the kernel is launched, which makes the host wait for the device. Nothing can be read
    back while a CUDA graph is captured, so the check is left out there, as it is with
    ``check=False``: the kernel then reads nothing for such an id and fills its row with NaN, in
    replays of the graph too. Checked calls before the capture (``torch.compile``'s warm-up is
    one) check their own ids.

    Args:
        ids: i64 or i32 [...], any shape, may be empty.
        weight_packed: i32 [V, words], words = :func:`packed_words`.
        weight_scale: f16, bf16 or f32 [V, groups]; groups divides ``hidden``, 1 is channel-wise.
        weight_zero_point: u8 codes [V, groups], or None: zero = 2**(bits - 1).
        bits: 2 to 8.
        hidden: H.
        packing: "dense" (a code may straddle two words) or "padded" (floor(32/bits) a word);
            for 2, 4 and 8 bits the two are the same.
        check: raise for ids outside the table.

    Returns:
        [..., H] in the scale's dtype.

    Raises:
        IndexError: an id is outside the table (with ``check``).
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous, or ``bits``,
            ``hidden`` or ``packing`` is not one of those above.
    """
    out: torch.Tensor = _embedding_gather_op(
        ids, weight_packed, weight_scale, weight_zero_point, bits, hidden, packing, check
    )
    return out
