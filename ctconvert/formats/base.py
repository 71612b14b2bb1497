"""What a source format is: how the tensors of one module describe and hold a logical weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from ctconvert.errors import BadInputError, IncompleteError
from ctconvert.formats.quantization import ModuleScheme, QuantArgs, activations_label, family
from ctconvert.specs import (
    SCALE_DTYPES,
    Dtype,
    Packing,
    QuantizedWeight,
    TensorSpec,
    WeightSpec,
)

if TYPE_CHECKING:
    import torch

#: The first compressed-tensors version that packs codes of 3, 5, 6 and 7 bits densely.
DENSE_SINCE = (0, 18)


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module by local name (``weight_packed``), headers only.

    ``values`` holds the contents of the few-element tensors a plan depends on
    (:data:`METADATA_NAMES`): shapes and activation scales, as flat lists. ``experts`` says that the
    specs are one expert's of 3-D tensors.
    """

    module: str
    specs: Mapping[str, TensorSpec]
    embedding: bool = False
    version: tuple[int, ...] | None = None
    values: Mapping[str, list[float]] = field(default_factory=dict)
    experts: bool = False

    def error(self, text: str) -> BadInputError:
        return BadInputError(f"module {self.module}: {text}")

    def need(self, name: str) -> TensorSpec:
        """The spec of a tensor that must be there.

        Raises:
            IncompleteError: it is not.
        """
        if name not in self.specs:
            raise IncompleteError(
                f"module {self.module}: tensor {name} is missing (has "
                f"{', '.join(sorted(self.specs))}); the checkpoint is incomplete or was not made "
                "by a compressed-tensors producer",
                module=self.module,
            )
        return self.specs[name]

    def check(self, name: str, dtypes: tuple[str, ...], rank: int | None = None) -> TensorSpec:
        """:meth:`need`, with its dtype and rank checked."""
        spec = self.need(name)
        if spec.dtype not in dtypes:
            raise self.error(f"{name} is {spec}, expected {' or '.join(dtypes)}")
        if rank is not None and len(spec.shape) != rank:
            raise self.error(f"{name} is {spec}, expected {rank} dimensions")
        return spec

    def check_zero_points(self, spec: WeightSpec) -> None:
        """Zero points that were stored for a symmetric scheme; that they are 0 is for the data.

        Raises:
            BadInputError: they are none of this weight's.
        """
        zero = self.specs["weight_zero_point"]
        allowed = (spec.scale_shape, (spec.n,) if spec.groups == 1 else (), (1,), ())
        if zero.shape not in allowed or zero.nbytes == 0:
            raise self.error(
                f"weight_zero_point is {zero} of a symmetric scheme, expected "
                f"{list(spec.scale_shape or ())} like the scale; the config and the tensors "
                "contradict each other"
            )


#: Few-element tensors whose values the plan needs (never weight data).
METADATA_NAMES = frozenset(
    {
        "weight_shape",
        "shape",
        "input_scale",
        "output_scale",
        "input_zero_point",
        "output_zero_point",
        "weight_global_scale",
        "input_global_scale",
    }
)


class ScaleSpec(NamedTuple):
    """Dtype and logical 2-D shape of a weight scale."""

    dtype: Dtype
    shape: tuple[int, int]


class Format(ABC):
    """A compressed-tensors format. Stateless; knows tensors by local names, never by file."""

    #: compressed-tensors' name of the format.
    name: ClassVar[str]
    #: The local name of the tensor that holds the codes.
    weight_name: ClassVar[str]

    @abstractmethod
    def spec(self, tensors: ModuleTensors, scheme: ModuleScheme) -> WeightSpec:
        """Checks a module's headers and describes its weight.

        Raises:
            BadInputError: a tensor is missing or has a wrong dtype or shape.
        """

    @abstractmethod
    def parameter_names(self, spec: WeightSpec) -> tuple[str, ...]:
        """Local names of the tensors that make up the weight (not of its bias)."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        """Tensors by local name, as :meth:`parameter_names` lists them, to the logical weight.

        Raises:
            ValueError: the data contradicts the spec (a NaN scale, a code out of range).
        """

    @abstractmethod
    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The inverse of :meth:`decode` but for the metadata tensors (shapes, side scales)."""


def check_not_empty(tensors: ModuleTensors, n: int, k: int) -> None:
    """Raises BadInputError for a weight without elements."""
    if n < 1 or k < 1:
        raise tensors.error(f"its weight is [{n}, {k}], which has no elements")


def weights_of(scheme: ModuleScheme, tensors: ModuleTensors) -> QuantArgs:
    """How the config says the weight is quantised.

    Raises:
        BadInputError: it says nothing of weights.
    """
    if scheme.weights is None:
        raise tensors.error(
            f"its config group has no weight scheme, but {scheme.format} tensors are stored; "
            "the config and the tensors contradict each other"
        )
    return scheme.weights


def weight_spec(
    scheme: ModuleScheme,
    tensors: ModuleTensors,
    *,
    n: int,
    k: int,
    storage: Literal["packed", "plain"],
    scale: ScaleSpec,
    element: Dtype = "I32",
    packing: Packing = "dense",
    has_g_idx: bool = False,
    sparse: bool = False,
) -> WeightSpec:
    """The spec of a quantised weight: what a format found, and what the config says of it."""
    args = weights_of(scheme, tensors)
    side, zero_points = side_scales(scheme, tensors)
    inputs = scheme.scheme.input_activations if scheme.scheme else None
    return WeightSpec(
        format=scheme.format,
        family=family(scheme, scheme.format, tensors.embedding),
        kind=args.type,
        bits=args.num_bits,
        n=n,
        k=k,
        storage=storage,
        element=element,
        packing=packing,
        strategy=args.strategy,
        group_size=args.group_size if args.strategy in ("group", "tensor_group") else None,
        block=args.block_structure,
        symmetric=args.symmetric,
        scale_dtype=scale.dtype,
        scale_shape=scale.shape,
        has_g_idx=has_g_idx,
        sparse=sparse,
        embedding=tensors.embedding,
        activations=activations_label(scheme.scheme),
        input_type=_element(inputs) if inputs else None,
        input_symmetric=inputs is None or inputs.symmetric,
        side=side,
        side_zero_points=zero_points,
    )


def _element(args: QuantArgs) -> str:
    """The dtype of values quantised so: ``I8``, ``F8_E4M3``, or a name for people."""
    if args.num_bits == 8:
        return "I8" if args.type == "int" else "F8_E4M3"
    return f"{args.type}{args.num_bits}"


def side_scales(
    scheme: ModuleScheme, tensors: ModuleTensors
) -> tuple[tuple[tuple[str, Dtype], ...], tuple[tuple[str, int], ...]]:
    """The static activation scales in use, and the activation zero points by value.

    A scale of 0 was never calibrated: it is not in the result, and its zero point neither.

    Raises:
        BadInputError: a scale the config asks for is missing, of a wrong shape or dtype, NaN,
            infinite or negative.
    """
    side: list[tuple[str, Dtype]] = []
    zero_points: list[tuple[str, int]] = []
    if scheme.scheme is None:
        return (), ()
    for end, args in (
        ("input", scheme.scheme.input_activations),
        ("output", scheme.scheme.output_activations),
    ):
        if args is None or args.dynamic or args.strategy != "tensor":
            continue
        name = f"{end}_scale"
        spec = tensors.check(name, SCALE_DTYPES)
        if spec.shape not in ((), (1,)):
            raise tensors.error(f"{name} is {spec}, expected one element")
        (value,) = tensors.values[name]
        if not 0 <= value < float("inf"):
            raise tensors.error(f"{name} is {value}; a scale must be finite and not negative")
        if value == 0:
            continue
        side.append((name, spec.dtype))
        zero_name = f"{end}_zero_point"
        if zero_name in tensors.specs:
            if tensors.specs[zero_name].shape not in ((), (1,)):
                raise tensors.error(
                    f"{zero_name} is {tensors.specs[zero_name]}, expected one element"
                )
            (zero,) = tensors.values[zero_name]
            if zero != int(zero):
                raise tensors.error(f"{zero_name} is {zero}, not a whole number")
            if args.type == "int":
                zero_points.append((zero_name, int(zero)))
            elif zero != 0:
                raise tensors.error(f"{zero_name} is {zero}, but FP8 values have no zero point")
        elif not args.symmetric:
            tensors.need(zero_name)
    return tuple(side), tuple(zero_points)


def activation_names(tensors: ModuleTensors, scheme: ModuleScheme) -> tuple[str, ...]:
    """Local names of the activation tensors the config's static schemes own."""
    if scheme.scheme is None:
        return ()
    names = []
    for end, args in (
        ("input", scheme.scheme.input_activations),
        ("output", scheme.scheme.output_activations),
    ):
        if args is not None and not args.dynamic and args.strategy == "tensor":
            names += [f"{end}_scale", f"{end}_zero_point"]
    return tuple(name for name in names if name in tensors.specs)


def scale_spec(
    tensors: ModuleTensors,
    args: QuantArgs,
    n: int,
    k: int,
    dtypes: tuple[str, ...] = SCALE_DTYPES,
) -> ScaleSpec:
    """Dtype and logical 2-D shape of ``weight_scale``, checked against the strategy.

    Raises:
        BadInputError: it is missing, of a wrong dtype or shape, or the group size does not
            divide K.
    """
    spec = tensors.check("weight_scale", dtypes)
    strategy = args.strategy
    group_size = args.group_size if strategy == "group" else None
    if strategy == "tensor":
        allowed: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
        logical = (1, 1)
    elif strategy == "channel":
        allowed = ((n, 1), (n,))
        logical = (n, 1)
    elif group_size is not None:
        if k % group_size:
            raise tensors.error(f"group size {group_size} does not divide K = {k}")
        logical = (n, k // group_size)
        allowed = (logical,)
    elif args.block_structure is not None:
        rows, columns = args.block_structure
        logical = (-(-n // rows), -(-k // columns))
        allowed = (logical,)
    else:
        raise tensors.error(f"weight strategy {strategy!r} is not one this format stores")
    if spec.shape not in allowed:
        raise tensors.error(
            f"weight_scale is {spec}, expected {list(allowed[0])} for strategy {strategy} of a "
            f"weight [{n}, {k}]" + (f" with group size {group_size}" if group_size else "")
        )
    return ScaleSpec(spec.dtype, logical)


def check_scale(scale: torch.Tensor) -> None:
    """Raises ValueError naming the first NaN or infinite scale of a 2-D float tensor."""
    import torch

    finite = torch.isfinite(scale)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        value = scale[row, column].item()
        raise ValueError(f"weight_scale[{row}, {column}] is {value}; the source is damaged")


def decode_side(tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> dict[str, torch.Tensor]:
    """The side scales in use, as [1]."""
    return {name: tensors[name].reshape(1) for name, _ in spec.side}
