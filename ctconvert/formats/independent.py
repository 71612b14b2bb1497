"""A second opinion: a module's dense weight by compressed-tensors' own decompressors.

Nothing here decodes anything, so it can judge what this package decodes and encodes. It is used on
the source's tensors, the other side being the dense weight of the output.

How they round. compressed-tensors computes ``(q - z) * s`` in the dtype of the scale: ``q`` and
``z`` are exact there, so each weight is the exact product rounded once to that dtype. Ours is
rounded once to f32, where a product of a code and an f16 or bf16 scale is exact (at most 20 of 24
bits). So ours, rounded to their dtype, is theirs bit for bit; with f32 scales both round the same
product to f32. FP4 is decoded in bf16, which holds every E2M1 value times a power of two; NVFP4
computes in f32, the scale divided by the global one first, and rounds to bf16.
:func:`difference` is therefore exact, with no tolerance.

Not judged are what compressed-tensors cannot decode and what it decodes wrongly without saying so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ctconvert.errors import UsageError
from ctconvert.formats.base import DENSE_SINCE
from ctconvert.formats.quantization import Scheme
from ctconvert.formats.quantization.handover import model_of
from ctconvert.formats.quantization.reading import UnreadError, printable
from ctconvert.specs import Packing

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

#: What the formats' decompressors read; others (activation scales, a bias) are none of theirs.
_READ = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_global_scale")
#: Older versions guess the block structure from the shapes, wrongly where an edge block is partial.
_BLOCKS_SINCE = (0, 20)


class NotJudgedError(Exception):
    """compressed-tensors is no judge of a module; the message says why."""


def dense_by_compressed_tensors(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    group: Mapping[str, Any] | Scheme,
    format: str,
    version: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The dense weight [N, K] of one module, in the dtype compressed-tensors decodes it to.

    Args:
        name: the module's, for messages.
        tensors: the module's tensors by local name, as the source stores them.
        group: its config group, best as config.json has it; a :class:`Scheme` for a preset.
        format: the format its tensors are stored in.
        version: of the compressed-tensors that wrote them, where the config says.

    Raises:
        NotJudgedError: compressed-tensors cannot decode it, or is known to decode it wrongly.
        UsageError: compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.compressors import BaseCompressor
    except ImportError:
        raise UsageError(
            "compressed-tensors, the independent judge, is not installed; pip install "
            "compressed-tensors"
        ) from None
    if "weight_g_idx" in tensors:
        raise NotJudgedError(f"module {name}: compressed-tensors no longer reads act-order")
    if format == "dense" or format not in BaseCompressor.registered_names():
        raise NotJudgedError(f"module {name}: compressed-tensors does not decode {format}")
    try:
        scheme = model_of(group)
    except UnreadError as error:
        raise NotJudgedError(f"module {name}: its config group: {error.text}") from None
    if scheme.weights is None:
        raise NotJudgedError(f"module {name}: its config group has no weight scheme")
    _check_packing(name, tensors, scheme, version)
    _check_blocks(name, tensors, scheme)
    state = {local: tensors[local] for local in _READ if local in tensors}
    if not scheme.weights.symmetric and "weight_zero_point" in tensors:
        state["weight_zero_point"] = tensors["weight_zero_point"]
    if "weight_shape" in state:
        state["weight_shape"] = state["weight_shape"].flatten()
    if scheme.weights.strategy == "channel":  # a vector would be spread along the wrong dimension
        for local in ("weight_scale", "weight_zero_point"):
            if local in state and state[local].ndim == 1:
                state[local] = state[local].unsqueeze(1)
    decompressor = BaseCompressor.get_value_from_registry(format)
    try:
        return decompressor.decompress(state, scheme)["weight"].detach()
    except (RuntimeError, ValueError, KeyError, TypeError, AssertionError, IndexError) as error:
        said = printable(f"{type(error).__name__}: {error}")
        raise NotJudgedError(
            f"module {name}: compressed-tensors cannot decode it ({said})"
        ) from None


def difference(theirs: torch.Tensor, ours: torch.Tensor) -> str:
    """Where an f32 dense weight of ours is not theirs, for a message; empty where it is.

    Args:
        theirs: from :func:`dense_by_compressed_tensors`.
        ours: f32 [N, K]; the comparison is exact, see the module's docstring.
    """
    if theirs.shape != ours.shape:
        return f"{list(ours.shape)}, compressed-tensors says {list(theirs.shape)}"
    rounded = ours.to(theirs.dtype)
    wrong = (rounded != theirs) & ~(rounded.isnan() & theirs.isnan())
    if not bool(wrong.any()):
        return ""
    row, column = wrong.nonzero()[0].tolist()
    return (
        f"[{row}, {column}] is {rounded[row, column].item()}, compressed-tensors says "
        f"{theirs[row, column].item()}; {int(wrong.sum())} of {wrong.numel()} weights differ"
    )


def _check_packing(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    scheme: QuantizationScheme,
    version: tuple[int, ...] | None,
) -> None:
    """Raises NotJudgedError for words that the installed version reads in the other packing."""
    bits = scheme.weights.num_bits
    if "weight_shape" not in tensors or "weight_packed" not in tensors or 32 % bits == 0:
        return
    words = tensors["weight_packed"].shape[-1]
    k = int(tensors["weight_shape"].flatten()[-1])
    counts: dict[Packing, int] = {"dense": -(-k * bits // 32), "padded": -(-k // (32 // bits))}
    fits = [packing for packing, count in counts.items() if count == words]
    if len(fits) == 2 and version is not None:
        fits = ["dense" if version >= DENSE_SINCE else "padded"]
    if fits != [_packing_read()]:
        found = " or ".join(fits) or "unknown"
        raise NotJudgedError(
            f"module {name}: its {bits}-bit codes are in {found} packing, and the installed "
            f"compressed-tensors reads only {_packing_read()}"
        )


def _packing_read() -> Packing:
    """Which packing the installed compressed-tensors has: 32 codes of 3 bits in 3 words or in 4."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    words = pack_to_int32(torch.zeros((1, 32), dtype=torch.int8), 3).shape[1]
    return "dense" if words == 3 else "padded"


def _check_blocks(
    name: str, tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme
) -> None:
    from compressed_tensors import __version__

    installed = tuple(int(part) for part in __version__.split(".")[:2])
    if scheme.weights.strategy != "block" or installed >= _BLOCKS_SINCE:
        return
    edges = zip(tensors["weight"].shape, scheme.weights.block_structure, strict=True)
    if any(size % edge for size, edge in edges):
        raise NotJudgedError(
            f"module {name}: the installed compressed-tensors misreads partial edge blocks"
        )
