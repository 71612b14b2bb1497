"""What the weights of the layouts on Marlin tiles are made of: a form names one combination."""

from __future__ import annotations

from typing import Literal, NamedTuple

Codes = Literal["int4", "int8", "magnitude8", "e2m1", "e4m3"]
Scales = Literal["float", "e8m0", "e5m3", "e4m3"]


class Form(NamedTuple):
    """A weight is code * scale of its group, times ``factor * 2**power`` where there is a factor.

    Codes: INT codes q + 2^(b-1); ``magnitude8``, INT8 as Humming stores it beside bfloat16 (q, or
    127 - q where q is negative); E2M1 and E4M3 floats. A NaN of E4M3 is read as 480, as Marlin and
    Humming read it.

    Scales [K/G, N]: of a 16- or 32-bit float dtype, or bytes: E8M0, E4M3, or E5M3 (no sign, five
    bits of exponent, bias 22, three of mantissa). Along N they are in Marlin's grouped order, E8M0
    and E5M3 with every run of four then as (0, 2, 1, 3); floats of one row in its channel-wise one.

    - ``group``: G, or None where any multiple of 16 that divides K will do;
    - ``powers``: what else the scales of a dtype hold: 2**power times as much;
    - ``zeros``: how zero points i32 [K/G, N/f] are packed, if there are any: ``interleaved`` in
      every word as Marlin's, or ``plain`` as Humming's.
    """

    codes: Codes
    scales: Scales = "float"
    group: int | None = None
    powers: tuple[int, int] = (0, 0)
    power: int | None = None
    zeros: Literal["interleaved", "plain"] | None = None

    @property
    def bits(self) -> int:
        return 4 if self.codes in ("int4", "e2m1") else 8


#: The forms by name. ``powers`` are those of float16 and bfloat16 scales.
FORMS: dict[str, Form] = {
    "int4": Form("int4", zeros="interleaved"),
    "int8": Form("int8", zeros="interleaved"),
    "mxfp4": Form("e2m1", "e8m0", 32),
    "mxfp8": Form("e4m3", "e8m0", 32),
    "nvfp4": Form("e2m1", "e5m3", 16, power=7 - 126),  # the exponent biases of bfloat16, float16
    "nvfp4-f16": Form("e2m1", "e5m3", 16, power=7 - 14),
    "fp8": Form("e4m3", powers=(8, 120)),
    "humming-int4": Form("int4", zeros="plain"),
    "humming-int8": Form("magnitude8"),
    "humming-nvfp4": Form("e2m1", "e4m3", 16, power=0),
}
