"""The one dequantisation step of the kernels on Marlin tiles: words and scales to weights.

Before: words of codes at bit positions known when compiling, and scales in Marlin's order; CODES
and SCALES say of what kind (``forms.py``). After: float32 weights.

A 4-bit or FP8 float's exponent and mantissa bits are put where float32 has its own: the number that
makes is too small by a power of two, exactly, a subnormal where the code is one. The power goes
into the group's scale, which costs nothing for a weight, but for E8M0 scales: they span all of
float32's exponents, and the code is multiplied first.
"""

import triton
import triton.language as tl

#: CODES; those from INT8 on have 8 bits
INT4 = tl.constexpr(0)
E2M1 = tl.constexpr(1)
INT8 = tl.constexpr(2)
MAGNITUDE8 = tl.constexpr(3)
E4M3 = tl.constexpr(4)
#: SCALES
FLOAT = tl.constexpr(0)
E8M0 = tl.constexpr(1)
E5M3 = tl.constexpr(2)
E4M3_SCALES = tl.constexpr(3)
#: ZEROS
NO_ZEROS = tl.constexpr(0)
INTERLEAVED = tl.constexpr(1)
PLAIN = tl.constexpr(2)


@triton.jit
def plain_words(words, CODES: tl.constexpr):
    """Words of offset codes, where the tiles have sign and magnitude, a negative q as 127 - q."""
    if CODES == MAGNITUDE8:
        signs = (words >> 7) & 0x01010101
        words = words ^ (signs * 127 + 0x80808080)
    return words


@triton.jit
def _int_values(words, SHIFT: tl.constexpr, BITS: tl.constexpr, scale, zero):
    """(code - zero) * scale of the code at SHIFT of each word; zero comes multiplied by scale.

    The code is masked where it stands: it is then 2**SHIFT too large, exactly, and so is
    divided out of the scale once for a row instead of being shifted once for a weight.
    """
    code = words & (((1 << BITS) - 1) << SHIFT)
    return code.to(tl.float32) * (scale * (1.0 / (1 << SHIFT))) - zero


@triton.jit
def _e2m1_bits(words, SHIFT: tl.constexpr):
    """The 4-bit floats at SHIFT, 2**126 too small."""
    top = (words << (28 - SHIFT)).to(tl.int32, bitcast=True)
    # The sign stays at the top as the rest moves down: one mask keeps both.
    return ((top >> 6) & -0x7E400000).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_bits(words, SHIFT: tl.constexpr):
    """The FP8 floats at SHIFT, 2**120 too small."""
    top = (words << (24 - SHIFT)).to(tl.int32, bitcast=True)
    return ((top >> 4) & -0x78100000).to(tl.float32, bitcast=True)


@triton.jit
def values(words, SHIFT: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, scale, zero):
    """The weights of the codes at SHIFT of each word; scale and zero as of :func:`load_group`."""
    if CODES == E2M1:
        found = _e2m1_bits(words, SHIFT)
        if SCALES == E8M0:
            found *= 8.507059173023462e37  # 2**126
        found *= scale
    elif CODES == E4M3:
        found = _e4m3_bits(words, SHIFT)
        if SCALES == E8M0:
            found *= 1.329227995784916e36  # 2**120
        found *= scale
    else:
        found = _int_values(words, SHIFT, 8 if CODES >= INT8 else 4, scale, zero)
    return found


@triton.jit
def both_k(words, SHIFT: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, scale, zero):
    """The weights of k3 = 0, 1 and k0 = 0, 1 of each word, [..., k0, k3]; SHIFT is the first's."""
    NEXT: tl.constexpr = 8 if CODES >= INT8 else 4
    low = tl.join(
        values(words, SHIFT, CODES, SCALES, scale, zero),
        values(words, SHIFT + 16, CODES, SCALES, scale, zero),
    )
    high = tl.join(
        values(words, SHIFT + NEXT, CODES, SCALES, scale, zero),
        values(words, SHIFT + NEXT + 16, CODES, SCALES, scale, zero),
    )
    return tl.join(low, high)


@triton.jit
def _byte_value(byte, SCALES: tl.constexpr):
    """A scale's byte in float32."""
    byte = byte.to(tl.uint32)
    if SCALES == E8M0:  # 2**(byte - 127): 0 is a subnormal, 255 is NaN
        bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
        found = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    elif SCALES == E5M3:
        found = (byte << 20).to(tl.float32, bitcast=True) * 4.056481920730334e31  # 2**105
    else:
        found = _e4m3_bits(byte, 0) * 1.329227995784916e36  # 2**120
    return found


@triton.jit
def _load_scales(s_ptr, g, N, row, CODES: tl.constexpr, SCALES: tl.constexpr, LIFT: tl.constexpr):
    """Scales times LIFT of the rows of both halves in group g, from the grouped order.

    Bytes come as i32 words [K/G, N/4]: one has both halves of two rows, or four rows of 8-bit
    codes.
    """
    # n = 16 j + 8 p + i (p the half, i = n % 8) is stored at 8 i + 2 j + p, and a tile's row is
    # 4 i + j (b = 4) or 8 i + 2 j + p (b = 8): the scales already stand in the order of the rows.
    FOUR: tl.constexpr = CODES < INT8
    if SCALES == FLOAT:
        if FOUR:
            s0 = tl.load(s_ptr + g * N + row * 2).to(tl.float32) * LIFT
            s1 = tl.load(s_ptr + g * N + row * 2 + 1).to(tl.float32) * LIFT
        else:
            s0 = tl.load(s_ptr + g * N + row).to(tl.float32) * LIFT
            s1 = s0
    elif FOUR:
        word = tl.load(s_ptr + g * (N // 4) + row // 2)
        if SCALES == E4M3_SCALES:
            first = row % 2 * 16
            second = first + 8
        else:  # the two middle ones of four are swapped
            first = row % 2 * 8
            second = first + 16
        s0 = _byte_value((word >> first) & 255, SCALES) * LIFT
        s1 = _byte_value((word >> second) & 255, SCALES) * LIFT
    else:
        word = tl.load(s_ptr + g * (N // 4) + row // 4)
        place = row % 4 * 8
        if SCALES != E4M3_SCALES:  # the two middle ones of four are swapped
            place = row % 2 * 16 + row // 2 % 2 * 8
        s0 = _byte_value((word >> place) & 255, SCALES) * LIFT
        s1 = s0
    return s0, s1


@triton.jit
def _load_zero(z_ptr, g, N, row, P1: tl.constexpr, CODES: tl.constexpr, ZEROS: tl.constexpr):
    """Zero points of the rows of half P1 in group g."""
    BITS: tl.constexpr = 8 if CODES >= INT8 else 4
    word = row // 4  # b = 4: i, after 8 words for each 64 columns before; b = 8: 2 i + p // 4
    if BITS == 4:
        shift = row % 4 * 4 + P1 * 16 if ZEROS == INTERLEAVED else row % 4 * 8 + P1 * 4
    else:
        shift = row % 2 * 16 + row // 2 % 2 * 8 if ZEROS == INTERLEAVED else row % 4 * 8
    words = tl.load(z_ptr + g * (N * BITS // 32) + word)
    return ((words >> shift) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def load_group(
    s_ptr,
    z_ptr,
    step,
    N,
    K,
    row,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    LIFT: tl.constexpr,
    ZEROS: tl.constexpr,
    KB: tl.constexpr,
    GT: tl.constexpr,
):
    """(scale, zero point times scale) of both halves, [rows, GT], for the tile at step.

    Scales come times LIFT; where all of K shares one, it is LIFT alone, and what remains is for
    the sums.
    """
    at = row[:, None]
    if GROUP == 0:
        g = tl.zeros([1, GT], tl.int32)
        s0 = tl.full([row.shape[0], GT], LIFT, tl.float32)
        s1 = s0
    else:
        k = step * KB + tl.arange(0, GT) * (KB // GT)
        g = tl.minimum(k // GROUP, K // GROUP - 1)[None, :]
        s0, s1 = _load_scales(s_ptr, g, N, at, CODES, SCALES, LIFT)
    if CODES == E2M1 or CODES == E4M3:  # noqa: SIM109 (what Triton compiles)
        z0 = s0
        z1 = s1
    elif ZEROS != NO_ZEROS:
        z0 = _load_zero(z_ptr, g, N, at, 0, CODES, ZEROS) * s0
        z1 = z0
        if CODES < INT8:
            z1 = _load_zero(z_ptr, g, N, at, 1, CODES, ZEROS) * s1
    else:
        z0 = s0 * (128 if CODES >= INT8 else 8)
        z1 = s1 * (128 if CODES >= INT8 else 8)
    return s0, s1, z0, z1


@triton.jit
def spread(values, R: tl.constexpr, GT: tl.constexpr, Q: tl.constexpr):
    """[R, GT] to [R, Q]: each group's value on its share of the columns."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], [R, GT, Q // GT]), [R, Q])
