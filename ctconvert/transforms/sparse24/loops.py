"""Loops that Numba compiles, for :mod:`ctconvert.transforms.sparse24.compiled`.

Each takes C-contiguous arrays and the range of the work that it does. A group of four elements is a
word of u64 (16-bit elements) or u32 (8-bit), its two kept values, lower column first, half a word.
"""

from __future__ import annotations

from numba import njit

from ctconvert.transforms.loops import U, loop


@loop
def scatter(pairs, nibbles, shifts, bits, groups, first, last):
    """Groups [N, K/4] of pairs [N, K/4] and nibbles u8 [N, >= K/8], rows ``first`` to ``last``.

    ``shifts`` u64 [16, 3] has for each nibble where the two values go in the word, and 1 where they
    are none and must be 0, 2 where the nibble is wrong. True where one is wrong.
    """
    low = (U(1) << bits) - U(1)
    wrong = U(0)
    for row in range(first, last):
        for g in range(groups.shape[1]):
            nibble = (nibbles[row, g >> 1] >> ((g & 1) * 4)) & 15
            pair = U(pairs[row, g])
            state = shifts[nibble, 2]
            wrong |= (state & U(2)) | ((U(0) - (state & U(1))) & pair)
            word = ((pair & low) << shifts[nibble, 0]) | ((pair >> bits) << shifts[nibble, 1])
            groups[row, g] = word
    return wrong != U(0)


@njit(inline="always")
def _settled(pair, clean, entry):
    """The values of a group, and what is wrong with it: nothing but 0 where all is well."""
    made = (clean >> (entry & U(31))) << ((entry >> U(5)) & U(31))
    return made, (entry & U(1 << 15)) | ((U(0) - ((entry >> U(14)) & U(1))) & pair)


@loop
def settle(words, codes, table, whole, masks, bits, target, nibbles, first, last):
    """Which two of a group are stored, made one choice for all weights of the same value.

    ``words`` u64 [N, K*b/128] hold the values, b bits each, ``codes`` u8 [N, K/8] a nibble a group,
    ``target`` and ``nibbles`` the same, rows ``first`` to ``last``. ``masks`` u64 [3] have all bits
    of the elements but the highest, those of the highest that alone make an element nonzero, else
    it is 0, and the highest. ``table`` u64 [64] has for every nibble, 16 more where the first value
    is nonzero and 32 more where the second is, how far the values go down, how far then up (5 bits
    each), the nibble (4 bits), and bits for: both values must be 0 to the bit; there is none.
    ``whole`` u16 [256] has the byte for two groups without a 0; 256 where there is none.

    The result is the sum of 1 where something is wrong and 2 where something changed.
    """
    low, signs, high = masks[0], masks[1], masks[2]
    half, top = U(2) * bits, bits - U(1)
    mask = (U(1) << half) - U(1)
    count = codes.shape[1] // words.shape[1]  # bytes of nibbles for a word
    wrong, changed = U(0), U(0)
    for row in range(first, last):
        source, before, made, after = words[row], codes[row], target[row], nibbles[row]
        for c in range(source.shape[0]):
            word = source[c]
            nonzero = (((word & low) + low) | (word & signs)) & high
            if nonzero == high:  # mostly, and then two groups are one look-up
                made[c] = word
                for place in range(count):
                    code = before[c * count + place]
                    nibble = whole[code]
                    after[c * count + place] = nibble
                    wrong |= U(nibble >> 8)
                    changed |= U(nibble ^ code)
                continue
            clean = word & (low | signs | nonzero)
            held = nonzero >> top
            held |= held >> top
            both = U(0)
            for place in range(count):
                code, shift = U(before[c * count + place]), U(2 * place) * half
                entry = table[(code & U(15)) | ((held >> shift) & U(3)) << U(4)]
                other = table[(code >> U(4)) | ((held >> (shift + half)) & U(3)) << U(4)]
                left, amiss = _settled((word >> shift) & mask, (clean >> shift) & mask, entry)
                shift += half
                right, astray = _settled((word >> shift) & mask, (clean >> shift) & mask, other)
                both |= (left | right << half) << (shift - half)
                nibble = ((entry >> U(10)) & U(15)) | (((other >> U(10)) & U(15)) << U(4))
                after[c * count + place] = nibble
                wrong |= amiss | astray
                changed |= nibble ^ code
            changed |= both ^ word
            made[c] = both
    return int(wrong != U(0)) | int(changed != U(0)) << 1


# The SM90 metadata, 64 rows by 128 columns after another; ``back`` is from its order to rows.


@loop
def order16(rows, flat, back, first, last):
    """u16 [N, K/16] and u16 [N*K/16] in the order for 16-bit elements: blocks of 64 rows."""
    height = rows.shape[0] // 64
    for strip in range(first, last):
        for block in range(rows.shape[1] // 8):
            for a in range(4):
                for b in range(2):
                    for c in range(8):
                        row = strip * 64 + a * 16 + b * 8 + c
                        at = (block * height + strip) * 512 + a * 128 + c * 8 + b
                        for d in range(4):
                            for e in range(2):
                                if back:
                                    rows[row, block * 8 + d * 2 + e] = flat[at + e * 64 + d * 2]
                                else:
                                    flat[at + e * 64 + d * 2] = rows[row, block * 8 + d * 2 + e]


@loop
def order8(rows, flat, back, first, last):
    """u64 [N, K/64] and u64 [N*K/64] in the order for 8-bit elements: blocks of 64 rows."""
    height = rows.shape[0] // 64
    for strip in range(first, last):
        for block in range(rows.shape[1] // 2):
            for row in range(64):
                at = ((block * height + strip) * 64 + row) * 2
                for half in range(2):
                    if back:
                        rows[strip * 64 + row, block * 2 + half] = flat[at + half]
                    else:
                        flat[at + half] = rows[strip * 64 + row, block * 2 + half]
