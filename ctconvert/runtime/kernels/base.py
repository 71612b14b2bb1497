"""What a kernel is to the modules, the proof and the benchmark: one record a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from ctconvert.runtime import activations
from ctconvert.runtime.kernels.fake_quant.kernel import fake_quant_int8
from ctconvert.specs import WeightSpec

Tensors = Mapping[str, torch.Tensor]

#: Ends the name of a 2:4 sparse product, as in ``int8 2:4``: twice the rate of the dense one.
SPARSE = " 2:4"


@dataclass(frozen=True)
class Binding:
    """What a converted module is.

    ``spec`` is the logical weight's, unpadded, its parts joined; ``padded`` are the N and K that
    the layout holds, ``widths`` the rows of each fused part.
    """

    layout: str
    spec: WeightSpec
    padded: tuple[int, int]
    widths: tuple[int, ...]

    @property
    def group_size(self) -> int:
        """Columns that share a scale: G, or K where channel-wise."""
        return self.spec.group_size or self.spec.k

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations to try a module with: float16 where its values or scales are."""
        half = "F16" in (self.spec.scale_dtype, self.spec.element)
        return torch.float16 if half else torch.bfloat16


def product_in_bf16(spec: WeightSpec) -> str | None:
    """Weights are dequantised and multiplied as 16-bit numbers."""
    return "bf16"


def product_in_8_bits(spec: WeightSpec) -> str | None:
    """``int8`` or ``fp8`` where the scheme quantises the activations."""
    if spec.input_type is None or spec.scale_shape is None:
        return "bf16"
    return "int8" if spec.kind == "int" else "fp8"


#: ``(bound, tensors, x [M, K], rows, offsets, bias [E, N])`` to [P, N]: stacked experts' tensors,
#: and the rest as ``marlin_grouped`` takes it.
Grouped = Callable[
    [Binding, Tensors, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]


def always(spec: WeightSpec) -> bool:
    """Whatever the layout takes."""
    return True


def never(spec: WeightSpec) -> Grouped | None:
    """Experts run one by one."""
    return None


def nothing(bound: Binding, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {}


@dataclass(frozen=True)
class Kernel:
    """The kernel of one layout. Tensors are the module's, exactly as the checkpoint holds them.

    - ``run(bound, tensors, x, bias)``: x [..., K] f16 or bf16 to [..., N] in x's dtype, or ids
      [...] to rows [..., K]; ``bias`` [N] of any float dtype, or None;
    - ``tolerance``: the largest error the proof allows, see ``proof.py``. 16-bit results round at
      2^-9 (bf16), and a dequantised weight may as well; a quantised activation may also fall on
      the other side of a rounding step;
    - ``activations(spec, tensors, x)``: what the scheme makes of x [M, K], float64; the product of
      that and the weight that the layout decodes to is the kernel's reference;
    - ``product(spec)``: what it multiplies in, which sets the flop/s it can reach: ``bf16`` (which
      stands for f16 too), ``int8`` or ``fp8``, with `` 2:4`` where it skips the zeros of a sparse
      weight; None for a look-up;
    - ``derived(bound, tensors)``: what it would otherwise compute from the weight on every call,
      handed to ``run`` among the tensors;
    - ``result``: the dtype it computes results in, where that is not x's;
    - ``takes(spec)``: whether it runs such weights of the layout;
    - ``grouped(spec)``: what runs stacked experts of such weights in one launch, or None;
    - ``unread``: tensors that only the way back to the source needs, by the end of their name;
    - ``lost``: those of them that hold what the kernel's tensors have no room for; to the
      reference they are 0, as to every kernel that reads the layout;
    - ``dtype``: of the activations that the layout's tensors are made for, where there is one;
    - ``plain``: it is only a path in plain torch, on any device: what it shows is that the layout's
      tensors mean the weight, and nothing of the kernel that serves them.
    """

    layout: str
    run: Callable[[Binding, Tensors, torch.Tensor, torch.Tensor | None], torch.Tensor]
    tolerance: float
    activations: Callable[[WeightSpec, Tensors, torch.Tensor], torch.Tensor] = activations.unchanged
    product: Callable[[WeightSpec], str | None] = product_in_bf16
    derived: Callable[[Binding, Tensors], dict[str, torch.Tensor]] = nothing
    result: torch.dtype | None = None
    takes: Callable[[WeightSpec], bool] = always
    grouped: Callable[[WeightSpec], Grouped | None] = never
    unread: tuple[str, ...] = ("_source", "_lost")
    lost: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    plain: bool = False


def like(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """The bias in x's dtype."""
    return None if bias is None else bias.to(x.dtype)


def padded(
    bound: Binding, x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and bias, in x's dtype, as wide as the padded tiles; what is added meets zero weights."""
    n, k = bound.padded
    bias = like(bias, x)
    if bias is not None:
        bias = F.pad(bias, (0, n - bound.spec.n))
    return F.pad(x, (0, k - bound.spec.k)).contiguous(), bias


def padded_rows(bound: Binding, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias, as long as a weight that is padded in its rows only."""
    more = bound.padded[0] - bound.spec.n
    return F.pad(bias, (0, more)) if bias is not None and more else bias


def fake_quantised(
    call: Callable[[torch.Tensor], torch.Tensor], tensors: Tensors, x: torch.Tensor
) -> torch.Tensor:
    """``call`` between the static INT8 activations that ride along, where there are any."""
    if "input_scale" in tensors:
        x = fake_quant_int8(x.contiguous(), tensors["input_scale"])
    out = call(x)
    if "output_scale" in tensors:
        out = fake_quant_int8(out.contiguous(), tensors["output_scale"])
    return out
