"""``verify --kernels``: runs every module's kernel against the plain reference.

The reference is the weight the layout decodes to, dense and in float64, and the scheme's activation
quantisation in plain torch; it shares no code with the kernels. (On a CPU there are no kernels:
their own references run, and of these the 2:4 one decompresses as the layout does.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctconvert.errors import VerificationError
from ctconvert.progress import Progress
from ctconvert.runtime.loading import Loader
from ctconvert.runtime.modules import KernelEmbedding, KernelLinear

#: Largest error by layout, see :func:`_error`. 16-bit outputs round at 2^-9 (bf16), and a
#: dequantised weight may as well; with quantised activations a value may also fall on the other
#: side of a rounding step.
TOLERANCE: dict[str, float] = {
    "triton-wna16": 1e-2,
    "marlin": 1e-2,
    "marlin-mxfp4": 1e-2,
    "scaled-mm": 2e-2,
    "cutlass-sparse24": 2e-2,
    "xpu-w4a8": 1e-2,
    "xpu-w4a16": 1e-2,
    "gather": 1e-2,
}
ROWS = (1, 17, 256)


@dataclass
class Worst:
    """The worst error of a layout, and where it was met."""

    error: float = 0.0
    module: str = ""
    case: str = ""
    modules: int = 0


def inputs(k: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Random and adversarial activations [M, K] by name, the same every time."""
    made = torch.Generator().manual_seed(k)
    found = {f"random M={m}": torch.randn((m, k), generator=made) for m in ROWS}
    found["zeros M=17"] = torch.zeros((17, k))
    one_hot = torch.zeros((17, k))
    one_hot[torch.arange(17), torch.randint(k, (17,), generator=made)] = 1.0
    found["one-hot M=17"] = one_hot
    found["large M=17"] = torch.randn((17, k), generator=made) * 1000.0
    outlier = torch.randn((17, k), generator=made)
    outlier[:, 0] *= 100.0
    found["outlier M=17"] = outlier
    return {name: x.to(dtype).to(device) for name, x in found.items()}


def _quantised_activations(module: KernelLinear, x: torch.Tensor) -> torch.Tensor:
    """What the scheme makes of x, in float64."""
    spec, tensors = module.binding.spec, module.tensors()
    if spec.family == "wna8o8":
        return _fake_quantised(x, tensors.get("input_scale")).double()
    quantised = spec.family == "w8a8" or (spec.sparse and spec.scale_shape is not None)
    if module.binding.layout == "xpu-w4a8":
        return _per_token_as_vllm(x)
    if not quantised or spec.input_type is None:
        return x.double()
    # The scheme's own steps, which are float32's: another precision would round some the other way.
    wide = x.float()
    # In a tensor: CUDA multiplies by the reciprocal of a plain number, which is another scale and
    # moves every quotient that lies between two codes to the same side.
    limit = wide.new_tensor(127.0 if spec.kind == "int" else 448.0)
    zero = torch.zeros((), device=x.device)
    if "input_scale" in tensors:
        scale = tensors["input_scale"]
        zero = tensors["input_zero_point"].float() if "input_zero_point" in tensors else zero
    else:
        rows = wide if spec.block is None else _blocks(wide, spec.block[1])
        scale = rows.abs().amax(-1, keepdim=True) / limit
        scale = torch.where(scale > 0, scale, 1.0)
        if spec.block is not None:
            scale = scale.expand_as(rows).flatten(-2)[:, : spec.k]
    if spec.kind == "int":
        codes = ((wide / scale).round() + zero).clamp(-128, 127) - zero
    else:
        codes = (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * scale.double()


def _per_token_as_vllm(x: torch.Tensor) -> torch.Tensor:
    """INT8 a token, its scale rounded to x's dtype: what the caller of the XPU kernel makes."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5).to(x.dtype)
    return (x.float() / scale.float()).round().clamp(-128, 127).double() * scale.double()


def _blocks(x: torch.Tensor, columns: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % columns))
    return padded.unflatten(-1, (-1, columns))


def _fake_quantised(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Static INT8 fake quantisation in x's dtype, half to even."""
    if scale is None:
        return x
    step = scale.to(x.dtype)
    return (x / step).round().clamp(-128, 127) * step


#: Rows of the weight that are float64 at a time.
_BLOCK_ROWS = 4096


def _check_linear(module: KernelLinear, dtype: torch.dtype, device: torch.device) -> Worst:
    weight = module.dequantize()
    cases = inputs(module.in_features, dtype, device)
    activations = torch.cat([_quantised_activations(module, x) for x in cases.values()])
    products, sizes = [], []
    for rows in weight.split(_BLOCK_ROWS):
        wide = rows.double().t()
        products.append(activations @ wide)
        sizes.append((activations.square() @ wide.square()).sqrt())
    counts = [len(x) for x in cases.values()]
    expected = torch.cat(products, dim=1).split(counts)
    size = torch.cat(sizes, dim=1).split(counts)
    # Beyond the largest number of the result's dtype it is infinite; so is what is expected.
    result = torch.float16 if module.binding.layout == "xpu-w4a8" else dtype
    limit = torch.finfo(result).max
    worst = Worst()
    for (case, x), product, near in zip(cases.items(), expected, size, strict=True):
        if module.bias is not None:
            product = product + module.bias.double()
        made = module.before_output_scale(x)
        product, seen = product.clamp(-limit, limit), made.double().clamp(-limit, limit)
        errors = [_error(seen, product, near)]
        if "output_scale" in module.tensors():
            # Compared by itself: a sum that rounds the other way may move a whole step.
            quantised = _fake_quantised(made, module.tensors()["output_scale"]).double()
            errors.append(_error(module(x).double(), quantised, quantised))
        if case == "random M=1":  # as a model calls it, one token of one sequence
            errors.append(_error(module(x[None])[0].double(), module(x).double(), near))
        for error in errors:
            if not error <= worst.error:  # NaN is worse than anything
                worst.error, worst.case = error, case
    return worst


def _check_embedding(module: KernelEmbedding, device: torch.device) -> Worst:
    weight = module.dequantize()
    made = torch.Generator().manual_seed(module.num_embeddings)
    worst = Worst()
    for count in ROWS:
        ids = torch.randint(module.num_embeddings, (count,), generator=made).to(device)
        ids[0], ids[-1] = 0, module.num_embeddings - 1
        expected = weight[ids].double()
        error = _error(module(ids).double(), expected, expected)
        if not error <= worst.error:
            worst.error, worst.case = error, f"{count} ids"
    return worst


def _error(made: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> float:
    """The worst of ||made - expected|| / ||size|| over the whole, each row and each column.

    One wrong column of many does not show in the whole. ``size`` [M, N] is what to measure an
    element by, no less than itself: sqrt(sum over k of (x * w)^2), which does not vanish where the
    terms of a sum happen to cancel. Columns of fewer than 17 rows are too few to judge. Where
    nothing is expected, any output is an error.
    """
    size = torch.maximum(size.abs(), expected.abs())
    difference = made - expected
    found = [
        _ratio(difference.norm(), size.norm()),
        _ratio(difference.norm(dim=1), size.norm(dim=1)),
    ]
    if len(made) >= ROWS[1]:
        found.append(_ratio(difference.norm(dim=0), size.norm(dim=0)))
    worst = torch.stack([part.max() for part in found])
    return float("nan") if worst.isnan().any() else float(worst.max())


def _ratio(difference: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    ratio = difference / size
    return torch.where(size == 0, torch.where(difference == 0, 0.0, torch.inf), ratio)


def _check(
    name: str,
    module: KernelLinear | KernelEmbedding,
    dtype: torch.dtype,
    device: torch.device,
    worst: dict[str, Worst],
) -> None:
    """Runs one module and notes its error under its layout."""
    binding = module.binding
    if isinstance(module, KernelEmbedding):
        found = _check_embedding(module, device)
    else:
        half = "F16" in (binding.spec.scale_dtype, binding.spec.element)
        found = _check_linear(module, torch.float16 if half else dtype, device)
    tolerance = TOLERANCE[binding.layout]
    if not found.error <= tolerance:
        raise VerificationError(
            f"module {name}: the {binding.layout} kernel is off by {found.error:.2e} "
            f"({found.case}), more than the tolerance {tolerance:.0e}"
        )
    seen = worst.setdefault(binding.layout, Worst())
    seen.modules += 1
    if found.error >= seen.error:
        seen.error, seen.module, seen.case = found.error, name, found.case


def verify_kernels(
    out: Path, device: str, progress: Progress, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Runs every module of a converted checkpoint and compares it with the reference.

    Args:
        out: a converted checkpoint.
        device: where the kernels run.
        progress: told of modules done, by their bytes.
        dtype: of the activations; float16 where a module's scales are.

    Returns:
        by layout: modules, worst relative error, where it was met, the tolerance.

    Raises:
        VerificationError: a kernel is off by more than its layout's tolerance.
    """
    worst: dict[str, Worst] = {}
    with Loader(out, device) as loader:
        sizes = loader.sizes()
        progress.phase("running", sum(sizes.values()))
        for whole in loader.bindings:
            # One at a time: memory is bounded by the largest, whatever the checkpoint's size.
            for name, module in loader.modules(whole).items():
                _check(name, module, dtype, loader.device, worst)
            progress.advance(sizes[whole])
    return {
        layout: {
            "modules": seen.modules,
            "worst_error": seen.error,
            "module": seen.module,
            "case": seen.case,
            "tolerance": TOLERANCE[layout],
        }
        for layout, seen in worst.items()
    }
