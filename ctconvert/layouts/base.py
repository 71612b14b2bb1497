"""What a kernel layout is: which weights it takes, and the tensors it makes of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from ctconvert.specs import Dtype, Family, QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch


class Layout(ABC):
    """A kernel layout. Stateless; knows tensors by local names (``qweight``), never by file.

    The weight it is given is one that an assembly made: a per-tensor scale is already one per
    output channel, and rows and columns are padded as :meth:`padded_shape` asks.
    """

    #: The name in the manifest and on the command line.
    name: ClassVar[str]
    #: Goes up whenever the bytes of any tensor change.
    version: ClassVar[int] = 1
    #: One line for ``ctconvert layouts`` and its page: which weights it takes.
    takes: ClassVar[str]
    #: Local names of the tensors it writes, for ``ctconvert layouts`` and its page.
    writes: ClassVar[str]
    #: The kernels that read it, for ``ctconvert layouts`` and its page; after a semicolon what
    #: stands for them here where they are not: see ``runtime.kernels``.
    read_by: ClassVar[str]
    #: Of the activations that its bytes are made for, where they depend on it.
    dtype: ClassVar[Dtype | None] = None

    @abstractmethod
    def supports(self, spec: WeightSpec) -> Support:
        """Whether the layout takes the weight; falsy with the reason where it does not."""

    @abstractmethod
    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        """Name, dtype and shape of every tensor :meth:`encode` makes."""

    @abstractmethod
    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The kernel's tensors, contiguous, on the weight's device.

        Raises:
            ValueError: the data is not what the layout can hold.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        """The exact inverse of :meth:`encode`: ``tensors`` and the spec to the weight."""

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N x K of the weight that :meth:`encode` is given: what is supported, padded if need be.

        What is added has code 0, scale 0 and zero point 0.
        """
        return spec.n, spec.k

    def common_power(self, scales: Iterable[torch.Tensor]) -> int | None:
        """The power of two that the weights of a stack have in common, given all their scales.

        None where the layout multiplies by none, and then ``scales`` are not read.
        """
        return None

    def views(self, spec: WeightSpec) -> dict[str, str]:
        """The tensors that a kernel takes another view of, for the manifest: ``t``, transposed."""
        return {}


def packed_codes(weight: QuantizedWeight) -> torch.Tensor:
    """The INT codes as i32 [N, words], K-packed (packs signed i8 where stored plain)."""
    if weight.spec.storage == "packed":
        return weight.codes
    from ctconvert.transforms.packed import pack_int8

    return pack_int8(weight.codes, weight.spec.bits)


def side_specs(spec: WeightSpec) -> dict[str, TensorSpec]:
    """Static activation scales ride along as f32 [1] (an exact widening)."""
    return {name: TensorSpec("F32", (1,)) for name, _ in spec.side}


def encode_side(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of :func:`side_specs`."""
    import torch

    return {name: tensor.to(torch.float32) for name, tensor in weight.side.items()}


def decode_side(tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> dict[str, torch.Tensor]:
    """The inverse of :func:`encode_side`, in the source's dtypes."""
    from ctconvert.transforms.dtypes import torch_dtype

    return {name: tensors[name].to(torch_dtype(dtype)) for name, dtype in spec.side}


def symmetric_activations(spec: WeightSpec) -> Support:
    """For kernels whose static activations have no zero point: it must not be lost."""
    for name, value in spec.side_zero_points:
        if value != 0:
            return Support(
                f"its {name} is {value} and the kernel's activations are symmetric; the zero "
                "point would be ignored"
            )
    return Support()


def no_table(spec: WeightSpec) -> Support:
    """Falsy for an embedding table, which no layout of a matmul takes."""
    if spec.embedding:
        return Support("it is an embedding table, and this layout is a matmul's", other_kind=True)
    return Support()


def of_family(spec: WeightSpec, wanted: Family) -> Support:
    """What a layout of one family of block-scaled weights asks of a scheme."""
    if not (general := no_table(spec)):
        return general
    if spec.family != wanted:
        return Support(
            f"scheme {spec.family} ({spec.label}) is not {wanted.upper()}", other_kind=True
        )
    return Support()


def weight_only(spec: WeightSpec) -> Support:
    """What every weight-only INT layout asks of a scheme, whatever its shapes."""
    if not (general := no_table(spec)):
        return general
    if spec.family not in ("wna16", "wna8o8", "w4a8"):
        return Support(
            f"scheme {spec.family} ({spec.label}) is not weight-only INT", other_kind=True
        )
    if not (activations := symmetric_activations(spec)):
        return activations
    if spec.strategy not in ("channel", "group"):
        return Support(f"scale strategy {spec.strategy} is not channel-wise or grouped")
    return Support()
