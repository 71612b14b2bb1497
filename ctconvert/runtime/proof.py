"""``verify --kernels``: runs every module's kernel against the plain reference.

The reference is the weight the layout decodes to, dense and in float64, and the scheme's activation
quantisation in plain torch; it shares no code with the kernels. (On a CPU there are no kernels:
their own references run, and of these the 2:4 one decompresses as the layout does.) Where a
layout's kernel is not here at all, a plain path stands for it, and the run says so; where there is
not even that, its modules are counted, and nothing is proved of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from msgspec.structs import replace

from ctconvert.errors import VerificationError
from ctconvert.output import Output
from ctconvert.progress import Progress
from ctconvert.records import KernelRun
from ctconvert.runtime import activations, kernels
from ctconvert.runtime.loading import Loader, Modules
from ctconvert.runtime.modules import KernelEmbedding, KernelExperts, KernelLinear

ROWS = (1, 17, 256)


@dataclass
class Worst:
    """The worst error of a module and the inputs it was met with."""

    error: float = 0.0
    case: str = ""

    def see(self, error: float, case: str) -> None:
        if not error <= self.error:  # NaN is worse than anything
            self.error, self.case = error, case


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


#: Rows of the weight that are float64 at a time.
_BLOCK_ROWS = 4096


def _check_linear(module: KernelLinear, device: torch.device) -> Worst:
    weight, tensors = module.dequantize(), module.tensors()
    kernel, binding = module.kernel, module.binding
    cases = inputs(module.in_features, module.activation_dtype, device)
    taken = torch.cat([kernel.activations(binding.spec, tensors, x) for x in cases.values()])
    products, sizes = [], []
    for rows in weight.split(_BLOCK_ROWS):
        wide = rows.double().t()
        products.append(taken @ wide)
        sizes.append((taken.square() @ wide.square()).sqrt())
    counts = [len(x) for x in cases.values()]
    expected = torch.cat(products, dim=1).split(counts)
    size = torch.cat(sizes, dim=1).split(counts)
    # Beyond the largest number of the result's dtype it is infinite; so is what is expected.
    limit = torch.finfo(kernel.result or module.activation_dtype).max
    worst = Worst()
    for (case, x), product, near in zip(cases.items(), expected, size, strict=True):
        if module.bias is not None:
            product = product + module.bias.double()
        made = module.before_output_scale(x)
        product, seen = product.clamp(-limit, limit), made.double().clamp(-limit, limit)
        errors = [_error(seen, product, near)]
        if "output_scale" in tensors:
            # Compared by itself: a sum that rounds the other way may move a whole step.
            quantised = activations.static_int8(made, tensors["output_scale"]).double()
            errors.append(_error(module(x).double(), quantised, quantised))
        if case == "random M=1":  # as a model calls it, one token of one sequence
            errors.append(_error(module(x[None])[0].double(), module(x).double(), near))
        for error in errors:
            worst.see(error, case)
    return worst


def _check_embedding(module: KernelEmbedding, device: torch.device) -> Worst:
    weight = module.dequantize()
    made = torch.Generator().manual_seed(module.num_embeddings)
    worst = Worst()
    for count in ROWS:
        ids = torch.randint(module.num_embeddings, (count,), generator=made).to(device)
        ids[0], ids[-1] = 0, module.num_embeddings - 1
        expected = weight[ids].double()
        worst.see(_error(module(ids).double(), expected, expected), f"{count} ids")
    return worst


#: Tokens to try stacked experts with: fewer than there are, and more than a tile has.
_TOKENS = (1, 3, 130)


def _check_experts(stack: KernelExperts, each: list[KernelLinear], device: torch.device) -> Worst:
    """All experts at once, tokens at random; two experts a token, and one expert without any."""
    spec, kernel = stack.binding.spec, stack.kernel
    made = torch.Generator().manual_seed(spec.k)
    limit = torch.finfo(stack.activation_dtype).max
    worst = Worst()
    for count in _TOKENS:
        x = torch.randn((count, spec.k), generator=made).to(stack.activation_dtype).to(device)
        score = torch.rand((count, stack.experts), generator=made)
        if stack.experts > 2:
            score[:, stack.experts // 2] = -1.0
        expert = score.topk(min(2, stack.experts), dim=1).indices
        order = expert.flatten().argsort(stable=True)
        sizes = expert.flatten().bincount(minlength=stack.experts)
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
        rows = (order // expert.shape[1]).int().to(device)
        out = stack(x, rows, offsets.int().to(device)).double()
        for index, module in enumerate(each):
            part = slice(int(offsets[index]), int(offsets[index + 1]))
            if part.start == part.stop:
                continue
            taken = kernel.activations(spec, module.tensors(), x[rows[part].long()])
            wide = module.dequantize().double().t()
            product, near = taken @ wide, (taken.square() @ wide.square()).sqrt()
            if module.bias is not None:
                product = product + module.bias.double()
            seen = out[part].clamp(-limit, limit)
            worst.see(_error(seen, product.clamp(-limit, limit), near), f"{count} tokens")
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
    module: KernelLinear | KernelEmbedding | KernelExperts,
    beside: Modules,
    device: torch.device,
) -> KernelRun:
    """Runs one module; ``beside`` are those of the same tensors."""
    layout, tolerance = module.kernel.layout, module.kernel.tolerance
    if isinstance(module, KernelEmbedding):
        found = _check_embedding(module, device)
    elif isinstance(module, KernelLinear):
        found = _check_linear(module, device)
    else:
        layout += " grouped"
        each = [other for other in beside.values() if isinstance(other, KernelLinear)]
        found = _check_experts(module, each, device)
    if not found.error <= tolerance:
        raise VerificationError(
            f"module {name}: the {layout} kernel is off by {found.error:.2e} ({found.case}), more "
            f"than the tolerance {tolerance:.0e}",
            module=name,
        )
    return KernelRun(layout, 1, found.error, name, found.case, tolerance, module.kernel.plain)


@dataclass(frozen=True)
class Proved:
    """What ran, by layout in the order met, and of layouts without a kernel the modules."""

    runs: tuple[KernelRun, ...]
    missing: dict[str, int]


def verify_kernels(output: Output, device: str, progress: Progress) -> Proved:
    """Runs every module of a converted checkpoint and compares it with the reference.

    Activations are bfloat16, float16 where a module's scales are or its layout is made for them.
    Stacked experts run one by one and, where a kernel takes them so, together: a run of its own,
    of the layout's name and ``grouped``.

    Args:
        output: a converted checkpoint.
        device: where the kernels run.
        progress: told of modules done, by their bytes.

    Raises:
        VerificationError: a kernel is off by more than its layout's tolerance.
        ConversionError: it is no longer the checkpoint that was opened.
    """
    runs: dict[str, KernelRun] = {}
    missing: dict[str, int] = {}
    with Loader(output, device) as loader:
        sizes = loader.sizes()
        progress.phase("running", sum(sizes.values()))
        for whole, binding in loader.bindings.items():
            if kernels.find(binding.layout, binding.spec) is None:
                missing[binding.layout] = missing.get(binding.layout, 0) + 1
                progress.advance(sizes[whole])
                continue
            # One at a time: memory is bounded by the largest, whatever the checkpoint's size.
            modules = loader.modules(whole)
            for name, module in modules.items():
                run = _check(name, module, modules, loader.device)
                seen = runs.setdefault(run.layout, replace(run, modules=0))
                worse = run if run.worst_error >= seen.worst_error else seen
                runs[run.layout] = replace(worse, modules=seen.modules + 1)
            del modules, module
            progress.advance(sizes[whole])
    return Proved(tuple(runs.values()), missing)
