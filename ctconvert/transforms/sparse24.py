"""2:4 sparse weights: the checkpoint's bitmask form, the dense form and CUTLASS's SM90 form.

Three forms of one weight, N output features by K input features, a *group* being the four
columns 4g..4g+3 of a row:

bitmask (checkpoint format ``sparse-24-bitmask``)
    ``compressed`` [N, K/2]   the kept values of a row in column order, two per group
    ``bitmask`` u8 [N, ceil(K/8)]   bit j of byte c (LSB first): column 8c + j is kept. Exactly two
    columns of every group are kept, also where fewer are nonzero, so a kept value may be 0.
dense
    ``dense`` [N, K]
SM90 (CUTLASS 3.x sparse GEMM, operand A compressed)
    ``values`` [N, K/2]   two per group: the group's elements at positions i0 and i1
    ``meta`` u8 [Np, Kp/8]   Np = N rounded up to 64, Kp = K rounded up to 128. A nibble
    ``i0 | i1 << 2`` per group, low nibble of a byte first; padding nibbles are 0. The nibble of
    (row m, columns k..k+3) is number
    ``((m//64)*64*128 + (k//128)*Np*128 + inner(m', k')) / 4``, where m' = m%64, k' = k%128 and
    8-bit elements:  inner = m'*128 + k'
    16-bit elements: inner = k'%16 + 16*((m'//8)%2) + 32*(k'//32) + 128*(m'%8)
    + 1024*((k'//16)%2) + 2048*(m'//16)

(i0, i1) by the group's nonzero elements: two at p0 < p1: (p0, p1); one at p <= 2: (p, 3); one at 3:
(0, 3); none: (0, 0). "Nonzero" means: the bits are not all 0, after -0.0 of the 16-bit floats
became +0.0. The 8-bit types are taken as raw bytes, so -0.0 of float8_e4m3fn counts as nonzero.
Source: CUTLASS 3.x, ``SM90StructuredSparseCompressor`` and ``Sm90GmmaSparseConfig``.

dtypes: float16, bfloat16, int8, float8_e4m3fn, always moved as bits. CPU tensors take the torch
path here, tensors of other devices the Triton kernels of ``sparse24_triton``; the results are
bit-equal.

How the CPU path works: a group is one word (int32 for 8-bit elements, int64 for 16-bit), its two
kept values are half a word. Which elements are nonzero becomes a 4-bit pattern, two patterns to a
byte, and small tables indexed by the pattern hold the factor or the shifts that move both values
at once. Work goes over blocks of rows, so the temporaries are a few cache-sized blocks and, for the
SM90 forms, one more copy of ``meta``.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import torch
from torch import Tensor

# One group and its two kept values, by element size in bytes.
GROUP_DTYPE = {1: torch.int32, 2: torch.int64}
PAIR_DTYPE = {1: torch.int16, 2: torch.int32}

_DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
# Groups of four in a block of rows on the CPU. Torch runs an elementwise operator on fewer than
# 32768 elements (its grain size) in the calling thread, so the threads of this file, or of the
# caller, never wait for one another's OpenMP teams; and the temporaries stay in the L2 cache.
_BLOCK_GROUPS = (1 << 15) - 1
# Under this many bytes of dense weight a thread costs more than it brings.
_THREADED_BYTES = 8 << 20

# Markers in the shift tables, larger than any shift, and in the byte tables.
_NO_VALUES = 64
_INVALID = 127
_INVALID_BYTE = 0xFF


def bitmask_decompress(compressed: Tensor, bitmask: Tensor, k: int) -> Tensor:
    """Dense weight of a ``sparse-24-bitmask`` one.

    Args:
        compressed: [N, K/2], one of the four dtypes.
        bitmask: u8 [N, ceil(K/8)].
        k: K, a multiple of 4.

    Returns:
        dense [N, K] in the dtype of ``compressed``; columns that are not kept are +0.

    Raises:
        ValueError: a shape, dtype or device does not fit, or a group does not keep exactly two
            columns (the message names the first such row and the group's first column).
    """
    _check_weight("compressed", compressed)
    n = compressed.shape[0]
    check_columns(k)
    _check_shape("compressed", compressed, (n, k // 2))
    _check_bytes("bitmask", bitmask, (n, -(-k // 8)), compressed)
    if compressed.device.type != "cpu":
        from ctconvert.transforms import sparse24_triton

        return sparse24_triton.bitmask_decompress_triton(compressed, bitmask, k)

    bitmask = bitmask.contiguous()
    size = compressed.element_size()
    dense = torch.empty((n, k), dtype=compressed.dtype)
    groups = dense.view(GROUP_DTYPE[size])
    pairs = words(compressed, PAIR_DTYPE[size])
    first, second = _mask_shifts(size)

    def block(rows: slice) -> None:
        mask = _whole_mask(bitmask[rows], k)
        ok = mask is not None and _scatter(
            pairs[rows], _table_index(mask, size), first, second, groups[rows]
        )
        if not ok:
            raise_mask_error(bitmask[rows], k, rows.start)

    _run_blocks(block, n, k, size)
    return dense


def bitmask_compress(dense: Tensor, bitmask: Tensor) -> Tensor:
    """Kept values of a dense weight, given which columns are kept.

    The inverse of `bitmask_decompress` for the same bitmask. Kept values are taken as they are,
    -0.0 included.

    Args:
        dense: [N, K], K a multiple of 4.
        bitmask: u8 [N, ceil(K/8)], exactly two columns of every group kept.

    Returns:
        compressed [N, K/2] in the dtype of ``dense``.

    Raises:
        ValueError: a shape, dtype or device does not fit, a group does not keep exactly two
            columns, or a column that is not kept holds a nonzero (row and column are named).
    """
    _check_weight("dense", dense)
    n, k = dense.shape
    check_columns(k)
    _check_bytes("bitmask", bitmask, (n, -(-k // 8)), dense)
    if dense.device.type != "cpu":
        from ctconvert.transforms import sparse24_triton

        return sparse24_triton.bitmask_compress_triton(dense, bitmask)

    bitmask = bitmask.contiguous()
    size = dense.element_size()
    compressed = torch.empty((n, k // 2), dtype=dense.dtype)
    pairs = compressed.view(PAIR_DTYPE[size])
    groups = words(dense, GROUP_DTYPE[size])
    factors = _mask_factors(size)

    def block(rows: slice) -> None:
        mask = _whole_mask(bitmask[rows], k)
        source = _even_columns(groups[rows]).view(torch.int64)
        pattern = _pattern(_code(_nonzero(source, size), size), size)
        if mask is None or int((pattern & ~mask).max()) != 0:
            raise_drop_error(dense[rows], bitmask[rows], rows.start)
        index = _table_index(mask, size)
        if size == 2:
            # What is not kept may be -0.0, and counts as zero.
            source = _look_up(_keep_masks(), index, source).bitwise_and_(source)
        if not _gather(source.view(GROUP_DTYPE[size]), index, factors, pairs[rows]):
            raise_drop_error(dense[rows], bitmask[rows], rows.start)

    _run_blocks(block, n, k, size)
    return compressed


def bitmask_of(dense: Tensor) -> Tensor:
    """A bitmask that keeps two columns of every group, all nonzero ones among them.

    Where fewer than two are nonzero, the lowest-numbered zero columns of the group are kept with
    them. (The producers took the two largest magnitudes by a top-k whose choice among equal zeros
    is not defined, so their masks cannot be rebuilt from the weight alone.) -0.0 of a 16-bit float
    counts as zero here.

    Args:
        dense: [N, K], K a multiple of 4.

    Returns:
        bitmask u8 [N, ceil(K/8)]; where K % 8 is 4 the last byte's high nibble is 0.

    Raises:
        ValueError: dtype or K does not fit, or a group has more than two nonzeros (row and column
            are named).
    """
    _check_weight("dense", dense)
    n, k = dense.shape
    check_columns(k)
    if dense.device.type != "cpu":
        from ctconvert.transforms import sparse24_triton

        return sparse24_triton.bitmask_of_triton(dense)

    size = dense.element_size()
    bitmask = torch.empty((n, -(-k // 8)), dtype=torch.uint8)
    groups = words(dense, GROUP_DTYPE[size])

    def block(rows: slice) -> None:
        source = _even_columns(groups[rows]).view(torch.int64)
        pattern = _pattern(_code(_nonzero(source, size), size), size)
        mask = _kept_of_pattern().index_select(0, pattern.to(torch.int32).flatten())
        if int(mask.max()) == _INVALID_BYTE:
            raise_dense_error(dense[rows], rows.start)
        bitmask[rows].copy_(mask.view_as(pattern))

    _run_blocks(block, n, k, size)
    if k % 8:
        bitmask[:, -1].bitwise_and_(0x0F)
    return bitmask


def sm90_compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    """CUTLASS SM90 form of a dense 2:4 weight (the module docstring has the layout).

    Args:
        dense: [N, K], K a multiple of 4.

    Returns:
        (values [N, K/2] in the dtype of ``dense``, meta u8 [Np, Kp/8]).

    Raises:
        ValueError: dtype or K does not fit, or a group has more than two nonzeros (row and column
            are named).
    """
    _check_weight("dense", dense)
    n, k = dense.shape
    check_columns(k)
    if dense.device.type != "cpu":
        from ctconvert.transforms import sparse24_triton

        return sparse24_triton.sm90_compress_triton(dense)

    size = dense.element_size()
    values = torch.empty((n, k // 2), dtype=dense.dtype)
    pairs = values.view(PAIR_DTYPE[size])
    meta = torch.zeros(meta_shape(n, k), dtype=torch.uint8)
    groups = words(dense, GROUP_DTYPE[size])
    factors = _pattern_factors(size)

    def block(rows: slice) -> None:
        source = _even_columns(groups[rows]).view(torch.int64)
        nonzero = _nonzero(source, size)
        if size == 2:
            source = _without_negative_zero(source, nonzero)
        code = _code(nonzero, size)
        pattern = _pattern(code, size)
        nibbles = _meta_of_pattern().index_select(0, pattern.to(torch.int32).flatten())
        if int(nibbles.max()) == _INVALID_BYTE:
            raise_dense_error(dense[rows], rows.start)
        meta[rows, : pattern.shape[1]].copy_(nibbles.view_as(pattern))
        _gather(source.view(GROUP_DTYPE[size]), code.flatten(), factors, pairs[rows])

    _run_blocks(block, n, k, size)
    return values, _to_kernel_order(meta, size)


def sm90_decompress(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    """Dense weight of an SM90 compressed one, the inverse of `sm90_compress`.

    Args:
        values: [N, K/2], one of the four dtypes.
        meta: u8 [Np, Kp/8].
        n: N.
        k: K, a multiple of 4.

    Returns:
        dense [N, K] in the dtype of ``values``.

    Raises:
        ValueError: a shape, dtype or device does not fit; an index pair is neither i0 < i1 nor
            (0, 0) with both values zero; or a padding nibble is not 0 (row and column are named).
    """
    _check_weight("values", values)
    check_columns(k)
    _check_shape("values", values, (n, k // 2))
    _check_bytes("meta", meta, meta_shape(n, k), values)
    if values.device.type != "cpu":
        from ctconvert.transforms import sparse24_triton

        return sparse24_triton.sm90_decompress_triton(values, meta, n, k)

    size = values.element_size()
    dense = torch.empty((n, k), dtype=values.dtype)
    groups = dense.view(GROUP_DTYPE[size])
    pairs = words(values, PAIR_DTYPE[size])
    nibbles = from_kernel_order(meta, size)
    first, second = _meta_shifts(size)
    if not _padding_is_zero(nibbles, n, k):
        raise_meta_error(values, nibbles, n, k, 0)

    def block(rows: slice) -> None:
        index = _table_index(nibbles[rows, : -(-k // 8)], size)
        if not _scatter(pairs[rows], index, first, second, groups[rows], _no_value_masks(size)):
            raise_meta_error(values[rows], nibbles[rows], rows.stop - rows.start, k, rows.start)

    _run_blocks(block, n, k, size)
    return dense


# --- shapes and checks ------------------------------------------------------------------------


def meta_shape(n: int, k: int) -> tuple[int, int]:
    """Shape of the SM90 meta tensor of an [n, k] weight: N padded to 64, K to 128, eight a byte."""
    return -(-n // 64) * 64, -(-k // 128) * 16


def check_columns(k: int) -> None:
    """Raise ValueError unless K is a positive multiple of 4."""
    if k <= 0 or k % 4:
        raise ValueError(f"2:4 sparsity needs K to be a positive multiple of 4, got K = {k}")


def _check_weight(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise ValueError(f"{name} is {tensor.dtype}; 2:4 weights are one of {known}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected two dimensions")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _check_bytes(name: str, tensor: Tensor, shape: tuple[int, int], weight: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name} is {tensor.dtype}, expected torch.uint8")
    _check_shape(name, tensor, shape)
    if tensor.device != weight.device:
        raise ValueError(f"{name} is on {tensor.device}, the values on {weight.device}")


def raise_mask_error(bitmask: Tensor, k: int, first_row: int) -> NoReturn:
    """Raise ValueError for the first group of these bitmask rows that does not keep two columns."""
    counts = _popcount(_split_nibbles(bitmask))
    wrong = counts != 2
    wrong[:, k // 4 :] = counts[:, k // 4 :] != 0
    row, group = _first(wrong)
    raise ValueError(_mask_message(int(counts[row, group]), first_row + row, 4 * group, k))


def _mask_message(count: int, row: int, column: int, k: int) -> str:
    where = f"row {row}, column {column}: the bitmask keeps {count} of 4 columns"
    if column >= k:
        return f"{where}, but the weight has only {k} columns"
    return f"{where}, 2:4 needs exactly 2"


def raise_dense_error(dense: Tensor, first_row: int) -> NoReturn:
    """Raise ValueError for the first group of these rows that has more than two nonzeros."""
    counts = _is_nonzero(dense).unflatten(1, (-1, 4)).sum(2)
    row, group = _first(counts > 2)
    raise ValueError(
        f"row {first_row + row}, column {4 * group}: {int(counts[row, group])} of 4 columns are "
        "nonzero, 2:4 allows 2"
    )


def raise_drop_error(dense: Tensor, bitmask: Tensor, first_row: int) -> NoReturn:
    """Raise ValueError for the first group whose bitmask is wrong or would drop a nonzero."""
    k = dense.shape[1]
    nibbles = _split_nibbles(bitmask)
    counts = _popcount(nibbles)
    wrong = counts != 2
    wrong[:, k // 4 :] = counts[:, k // 4 :] != 0
    kept = (nibbles[:, : k // 4, None] >> torch.arange(4, dtype=torch.uint8)) & 1
    dropped = _is_nonzero(dense) & (kept.flatten(1) == 0)
    wrong[:, : k // 4] |= dropped.unflatten(1, (-1, 4)).any(2)
    row, group = _first(wrong)
    count = int(counts[row, group])
    if count != 2 or 4 * group >= k:
        raise ValueError(_mask_message(count, first_row + row, 4 * group, k))
    column = 4 * group + int(dropped[row, 4 * group : 4 * group + 4].nonzero()[0, 0])
    raise ValueError(f"row {first_row + row}, column {column}: nonzero, but the bitmask drops it")


def raise_meta_error(values: Tensor, nibbles: Tensor, n: int, k: int, first_row: int) -> NoReturn:
    """Raise ValueError for the first invalid nibble of a row-major meta tensor of n rows."""
    codes = _split_nibbles(nibbles)
    low, high = codes & 3, codes >> 2
    wrong = codes != 0
    inside = wrong[:n, : k // 4]
    empty = (_bits(values) == 0).unflatten(1, (-1, 2)).all(2)
    inside &= low[:n, : k // 4] >= high[:n, : k // 4]
    inside |= (codes[:n, : k // 4] == 0) & ~empty
    row, group = _first(wrong)
    where = f"row {first_row + row}, column {4 * group}"
    pair = f"({int(low[row, group])}, {int(high[row, group])})"
    if row >= n or 4 * group >= k:
        raise ValueError(f"{where}: padding of the metadata is not 0 but the pair {pair}")
    if int(codes[row, group]) == 0:
        raise ValueError(f"{where}: the index pair is (0, 0) but the values are not both zero")
    raise ValueError(f"{where}: {pair} is no index pair of the metadata")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int8 if tensor.element_size() == 1 else torch.int16)


def _is_nonzero(dense: Tensor) -> Tensor:
    bits = _bits(dense)
    return bits != 0 if dense.element_size() == 1 else (bits & 0x7FFF) != 0


def _split_nibbles(packed: Tensor) -> Tensor:
    """u8 [R, C] -> its nibbles u8 [R, 2C], low nibble first."""
    return torch.stack((packed & 0x0F, packed >> 4), 2).flatten(1)


def _popcount(nibbles: Tensor) -> Tensor:
    return (nibbles & 1) + (nibbles >> 1 & 1) + (nibbles >> 2 & 1) + (nibbles >> 3)


def _first(wrong: Tensor) -> tuple[int, int]:
    """Row and column of the first true element, row by row."""
    position = int(wrong.flatten().to(torch.uint8).argmax())
    row, column = divmod(position, wrong.shape[1])
    if not bool(wrong[row, column]):
        raise RuntimeError("a 2:4 transform reported an error that its tensors do not show")
    return row, column


# --- CPU path: blocks, words and patterns -----------------------------------------------------


def words(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor's bytes seen as wider words; copied only where not contiguous or not aligned."""
    tensor = tensor.contiguous()
    if tensor.data_ptr() % 8 or tensor.storage_offset() * tensor.element_size() % 8:
        tensor = tensor.clone()
    return tensor.view(dtype)


def _run_blocks(work: Callable[[slice], None], n: int, k: int, size: int) -> None:
    """Call ``work`` on blocks of rows, on several threads for a large weight.

    A caller that is itself a worker thread gets no further threads: it has its own share of the
    cores. The error raised is the one of the first rows that have one.
    """
    step = max(1, _BLOCK_GROUPS // -(-k // 4))
    blocks = [slice(start, min(n, start + step)) for start in range(0, n, step)]
    workers = 1
    if n * k * size >= _THREADED_BYTES and threading.current_thread() is threading.main_thread():
        workers = min(torch.get_num_threads(), len(blocks), 8)  # beyond 8 the GIL is the limit
    if workers == 1:
        for rows in blocks:
            work(rows)
        return
    cuts = [len(blocks) * i // workers for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        # A thread starts outside inference mode, where the outputs could then not be written.
        inference = torch.is_inference_mode_enabled()
        shares = [
            pool.submit(_run_share, work, blocks[start:stop], inference)
            for start, stop in itertools.pairwise(cuts)
        ]
        for share in shares:
            share.result()


def _run_share(work: Callable[[slice], None], blocks: list[slice], inference: bool) -> None:
    with torch.inference_mode(inference):
        for rows in blocks:
            work(rows)


def _even_columns(block: Tensor) -> Tensor:
    """The block with a zero group added to each row where the number of groups is odd."""
    if block.shape[1] % 2:
        return torch.nn.functional.pad(block, (0, 1))
    return block


def _whole_mask(mask: Tensor, k: int) -> Tensor | None:
    """The bitmask rows with a valid group past an odd K/4; None where bits are set there."""
    if k % 8 == 0:
        return mask
    if bool((mask[:, -1] > 0x0F).any()):
        return None
    mask = mask.clone()
    mask[:, -1] |= 0x30
    return mask


def _repeated(value: int, bits: int, word_bits: int) -> int:
    """``value`` in every field of ``bits`` bits of a word."""
    return sum(value << shift for shift in range(0, word_bits, bits))


def _nonzero(block: Tensor, size: int) -> Tensor:
    """The words with the top bit set of every nonzero element, and no other bit.

    The sign of a 16-bit float does not count.
    """
    low = _repeated((1 << 8 * size - 1) - 1, 8 * size, 8 * block.element_size())
    # The sum cannot carry out of an element.
    top = (block & low).add_(low)
    if size == 1:
        top.bitwise_or_(block)
    return top.bitwise_and_(~low)


def _without_negative_zero(block: Tensor, nonzero: Tensor) -> Tensor:
    """The words with -0.0 of 16-bit floats made +0.0: the sign goes where nothing is nonzero."""
    low = _repeated(0x7FFF, 16, 8 * block.element_size())
    return (nonzero | low).bitwise_and_(block)


def _code(nonzero: Tensor, size: int) -> Tensor:
    """Gathers the top bits of the words' elements, in place: bit j for element j."""
    word, bits = 8 * nonzero.element_size(), 8 * size
    count = word // bits
    # The product moves the top bit of element j to bit j of the topmost ``count`` bits. No two
    # terms meet, so nothing carries.
    factor = sum(1 << word - count + j - (bits * j + bits - 1) for j in range(count))
    return nonzero.mul_(factor).bitwise_right_shift_(word - count).bitwise_and_((1 << count) - 1)


def _pattern(code: Tensor, size: int) -> Tensor:
    """Codes of all words of a row -> u8 [R, ceil(K/8)]: bit j of byte c for column 8c + j."""
    pattern = code.to(torch.uint8)
    if size == 1:
        return pattern
    pairs = pattern.view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def _table_index(pattern: Tensor, size: int) -> Tensor:
    """i32 row numbers for the word tables: one a byte for 8-bit elements, else one a nibble."""
    if size == 2:
        spread = pattern.to(torch.int16)
        spread = (spread << 4).bitwise_or_(spread).bitwise_and_(0x0F0F)
        pattern = spread.view(torch.uint8)
    return pattern.to(torch.int32).flatten()


def _look_up(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Table rows as words of the dtype and shape of ``like``."""
    return table.index_select(0, index).view(like.dtype).view_as(like)


def _gather(block: Tensor, index: Tensor, factors: Tensor, out: Tensor) -> bool:
    """Write both kept values of every group to ``out``; False where a table row is invalid.

    All other elements of the group are zero, so one product moves both values to the word's top.
    """
    moved = _look_up(factors, index, block)
    if int(moved.min()) < 0:
        return False
    moved.mul_(block).bitwise_right_shift_(4 * block.element_size())
    out.copy_(moved[:, : out.shape[1]])
    return True


def _scatter(
    pairs: Tensor,
    index: Tensor,
    first: Tensor,
    second: Tensor,
    out: Tensor,
    no_values: Tensor | None = None,
) -> bool:
    """Write the groups of value pairs to ``out``; False where a table row or a value is invalid."""
    columns = out.shape[1]
    low, high = (0x00FF, 0xFF00) if out.dtype == torch.int32 else (0xFFFF, 0xFFFF0000)
    upper = _even_columns(pairs).to(out.dtype)
    shift = _look_up(first, index, upper)
    marker = int(shift.max())
    if marker == _INVALID:
        return False
    if marker == _NO_VALUES and no_values is not None:
        held = _look_up(no_values, index, upper).bitwise_and_(upper)
        if any(int(extreme) != 0 for extreme in held.aminmax()):
            return False
    lower = (upper & low).bitwise_left_shift_(shift)
    shift = _look_up(second, index, upper)
    upper.bitwise_and_(high).bitwise_left_shift_(shift)
    torch.bitwise_or(lower[:, :columns], upper[:, :columns], out=out)
    return True


def _index_pair(pattern: int) -> tuple[int, int] | None:
    """SM90 index pair of a 4-bit nonzero pattern; None for more than two nonzeros."""
    positions = [p for p in range(4) if pattern >> p & 1]
    if len(positions) > 2:
        return None
    if len(positions) == 2:
        return positions[0], positions[1]
    if len(positions) == 1:
        return (positions[0], 3) if positions[0] < 3 else (0, 3)
    return 0, 0


def kept_pair(mask: int) -> tuple[int, int] | None:
    """The two columns a bitmask nibble keeps; None unless there are exactly two."""
    return _index_pair(mask) if mask.bit_count() == 2 else None


def _meta_pair(nibble: int) -> tuple[int, int] | None:
    """Index pair of an SM90 nibble; None where it is not one."""
    low, high = nibble & 3, nibble >> 2
    return (low, high) if low < high or nibble == 0 else None


def _word_table(size: int, entry: Callable[[int], int]) -> Tensor:
    """i64 table of a word per group: 256 rows of two int32 (8-bit elements) or 16 rows of one."""
    if size == 2:
        return torch.tensor([entry(i) for i in range(16)], dtype=torch.int64)
    return torch.tensor(
        [(entry(i >> 4) << 32) + (entry(i & 15) & 0xFFFFFFFF) for i in range(256)],
        dtype=torch.int64,
    )


def _factor_table(size: int, pair_of: Callable[[int], tuple[int, int] | None]) -> Tensor:
    bits = 8 * size

    def factor(code: int) -> int:
        pair = pair_of(code)
        if pair is None:
            return -1
        if pair == (0, 0):
            return 0
        # Element i0 goes to position 2 of the word, element i1 to position 3. Where the two lie
        # side by side one power of two moves both. What else the product makes falls below.
        return (1 << bits * (2 - pair[0])) | (1 << bits * (3 - pair[1]))

    return _word_table(size, factor)


def _shift_tables(
    size: int, pair_of: Callable[[int], tuple[int, int] | None]
) -> tuple[Tensor, Tensor]:
    def shift(code: int, slot: int) -> int:
        pair = pair_of(code)
        if pair is None:
            return _INVALID
        # The second value already stands one element up.
        return _NO_VALUES if pair == (0, 0) else 8 * size * (pair[slot] - slot)

    return _word_table(size, lambda c: shift(c, 0)), _word_table(size, lambda c: shift(c, 1))


@functools.cache
def _pattern_factors(size: int) -> Tensor:
    return _factor_table(size, _index_pair)


@functools.cache
def _mask_factors(size: int) -> Tensor:
    return _factor_table(size, kept_pair)


@functools.cache
def _mask_shifts(size: int) -> tuple[Tensor, Tensor]:
    return _shift_tables(size, kept_pair)


@functools.cache
def _meta_shifts(size: int) -> tuple[Tensor, Tensor]:
    return _shift_tables(size, _meta_pair)


@functools.cache
def _no_value_masks(size: int) -> Tensor:
    """Ones over the value pair of every group whose nibble says that it holds none."""
    ones = (1 << 16 * size) - 1
    return _word_table(size, lambda code: ones if code == 0 else 0)


@functools.cache
def _keep_masks() -> Tensor:
    """Ones over the kept columns of a group of four 16-bit elements."""

    def ones(code: int) -> int:
        mask = sum(0xFFFF << 16 * p for p in range(4) if code >> p & 1)
        return mask - (1 << 64) if mask >> 63 else mask

    return _word_table(2, ones)


def _byte_table(nibble_of: Callable[[int], int | None], invalid: int) -> Tensor:
    """u8 [256]: a nibble for each nibble, ``invalid`` where either has none."""
    rows = []
    for byte in range(256):
        low, high = nibble_of(byte & 15), nibble_of(byte >> 4)
        rows.append(invalid if low is None or high is None else low | high << 4)
    return torch.tensor(rows, dtype=torch.uint8)


def meta_nibble(pattern: int) -> int | None:
    """SM90 nibble of a 4-bit nonzero pattern; None for more than two nonzeros."""
    pair = _index_pair(pattern)
    return None if pair is None else pair[0] | pair[1] << 2


@functools.cache
def _meta_of_pattern() -> Tensor:
    return _byte_table(meta_nibble, _INVALID_BYTE)


def kept_of_pattern(pattern: int) -> int | None:
    """Bitmask nibble `bitmask_of` gives a nonzero pattern; None for more than two nonzeros."""
    for column in range(4):
        if pattern.bit_count() < 2:
            pattern |= 1 << column
    return pattern if pattern.bit_count() == 2 else None


@functools.cache
def _kept_of_pattern() -> Tensor:
    return _byte_table(kept_of_pattern, _INVALID_BYTE)


# --- the order of the metadata ----------------------------------------------------------------


def _to_kernel_order(rows: Tensor, size: int) -> Tensor:
    """Row-major nibbles u8 [Np, Kp/8] -> the kernel's order, same shape."""
    if size == 1:
        # [N/64, 64, K/128, 16 bytes] -> [K/128, N/64, 64, 16 bytes]
        runs = rows.view(torch.int64).view(rows.shape[0] // 64, 64, rows.shape[1] // 16, 2)
        blocks = runs.permute(2, 0, 1, 3)
        return blocks.reshape(-1).view(torch.uint8).view(rows.shape)
    # Four nibbles (16 columns) are one int16:
    # [N/64, m'//16, m'//8%2, m'%8, K/128, k'//32, k'//16%2] -> the order of the formula.
    units = rows.view(torch.int16).view(rows.shape[0] // 64, 4, 2, 8, rows.shape[1] // 16, 4, 2)
    return units.permute(4, 0, 1, 6, 3, 5, 2).reshape(-1).view(torch.uint8).view(rows.shape)


def from_kernel_order(meta: Tensor, size: int) -> Tensor:
    """Inverse of the order of the SM90 metadata: u8 [Np, Kp/8] with row-major nibbles."""
    flat = words(meta, torch.int64).view(-1)
    blocks = meta.shape[1] // 16, meta.shape[0] // 64
    if size == 1:
        order = flat.view(*blocks, 64, 2).permute(1, 2, 0, 3)
    else:
        order = flat.view(torch.int16).view(*blocks, 4, 2, 8, 4, 2).permute(1, 2, 6, 4, 0, 5, 3)
    return order.reshape(-1).view(torch.uint8).view(meta.shape)


def _padding_is_zero(nibbles: Tensor, n: int, k: int) -> bool:
    whole = -(-k // 8)
    edge = nibbles[:n, k // 8 : whole] >> 4
    return not any(bool(part.any()) for part in (nibbles[n:], nibbles[:n, whole:], edge))
