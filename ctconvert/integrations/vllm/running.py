"""What runs a layer: vLLM's own kernel where it has one for the layout, else this package's."""

from __future__ import annotations

import logging

import torch

from ctconvert.errors import UsageError
from ctconvert.integrations.vllm import engine
from ctconvert.runtime import kernels
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import Tensors
from ctconvert.transforms.dtypes import torch_dtype

logger = logging.getLogger("vllm.ctconvert")
_told: set[str] = set()


class Running:
    """The kernel of a layer; ``by`` says whose it is.

    Args:
        name: the layer's, for messages.
        bound: its weight on this rank.
        dtype: of the activations.
        prepared: whether :meth:`prepare` will be called.

    Raises:
        UsageError: nothing runs such weights here, or not with activations of that dtype.
    """

    def __init__(
        self, name: str, bound: Binding, dtype: torch.dtype, prepared: bool = True
    ) -> None:
        self.bound, self.dtype = bound, dtype
        self.engine = engine.find(bound, dtype, prepared)
        self.kernel = kernels.find(bound.layout, bound.spec)
        if self.engine is None and self.kernel is None:
            kernels.get(bound.layout, bound.spec)  # says so
        needed = None if self.kernel is None else self.kernel.dtype
        if bound.spec.element in ("F16", "BF16"):
            needed = torch_dtype(bound.spec.element)
        if needed not in (None, dtype):
            held = str(needed).removeprefix("torch.")
            raise UsageError(
                f"module {name}: layout {bound.layout} is made for {held} activations: pass "
                f"--dtype {held}"
            )
        self.derived: dict[str, torch.Tensor] = {}
        chosen = self.engine or self.kernel
        assert chosen is not None
        self.chosen = chosen
        self.by = "ctconvert" if self.engine is None else f"vLLM's {self.engine.name}"

    def prepare(self, tensors: Tensors) -> None:
        """Computes what the kernel would on every call; the tensors stay as they are."""
        self.derived = self.chosen.derived(self.bound, tensors)
        tell(self.bound, self.by)

    def __call__(
        self, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., K] to [..., N]."""
        return self.chosen.run(self.bound, {**tensors, **self.derived}, x.contiguous(), bias)


def tell(bound: Binding, by: str, what: str = "") -> None:
    """Logs, once for each kind of weight, whose kernel runs it."""
    line = f"{what}{bound.layout} ({bound.spec.label}) runs on {by}"
    if line not in _told:
        _told.add(line)
        logger.info("%s", line)
