"""Methods of vLLM's linear layers: converted ones, and those that are not quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)

from ctconvert.errors import VerificationError
from ctconvert.integrations.vllm.arrivals import Arrivals, loaded_elsewhere, noting, part_of
from ctconvert.integrations.vllm.cuts import Held, Share, share
from ctconvert.integrations.vllm.running import Running
from ctconvert.integrations.vllm.served import UNREAD
from ctconvert.records import Convert
from ctconvert.transforms.dtypes import torch_dtype


def _sizes(layer: torch.nn.Module, output_size: int) -> list[int]:
    """Rows of each part of a layer, over all ranks."""
    if isinstance(layer, QKVParallelLinear):  # its own output_sizes count repeated heads
        kv = layer.total_num_kv_heads
        return [
            layer.total_num_heads * layer.head_size,
            kv * layer.head_size,
            kv * layer.v_head_size,
        ]
    return list(getattr(layer, "output_sizes", None) or [output_size])


def parameter(held: Held, share: Share, loader: Callable[..., Any]) -> Parameter:
    """vLLM's parameter for a tensor, which its loader can narrow along N and K."""
    data = torch.empty(held.spec.shape, dtype=torch_dtype(held.spec.dtype))
    dims: dict[str, Any] = {"data": data, "weight_loader": loader}
    if held.n is not None:
        rows = Fraction(share.binding.spec.n, held.spec.shape[held.n])
        dims |= {"output_dim": held.n, "packed_dim": held.n, "packed_factor": rows}
    if held.k is not None:
        dims["input_dim"] = held.k
    kinds = {
        (True, True): PackedvLLMParameter,
        (True, False): PackedColumnParameter,
        (False, True): RowvLLMParameter,
        (False, False): BasevLLMParameter,
    }
    return kinds[held.n is not None, held.k is not None](**dims)


@register_weight_loader_v2_supported_method
class CtconvertLinear(LinearMethodBase):
    """A layer made of converted modules: its parameters are the checkpoint's tensors.

    Nothing is left to do after loading, so weights that another process has loaded serve as well.
    """

    supports_pre_processed_weights = True

    def __init__(self, parts: Sequence[Convert], hashes: Mapping[str, str]) -> None:
        self.parts, self.hashes = parts, hashes
        self.running: Running | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = _sizes(layer, output_size)
        if self.parts[0].rank is not None:  # the converter has cut them
            sizes, input_size = output_partition_sizes, input_size_per_partition
        self.make(
            layer,
            share(
                layer.prefix,
                self.parts,
                sizes,
                input_size,
                output_partition_sizes,
                input_size_per_partition,
            ),
            params_dtype,
            extra_weight_attrs["weight_loader"],
        )

    def make(
        self,
        layer: torch.nn.Module,
        share: Share,
        dtype: torch.dtype,
        weight_loader: Callable[..., Any],
    ) -> None:
        """Gives the layer its parameters."""
        names = [local for local in share.tensors if not local.endswith(UNREAD)]
        self.arrivals = Arrivals(
            {
                (local, index): part.locals(0)[local]
                for index, part in enumerate(self.parts)
                for local in names
            },
            self.hashes,
        )
        self.running = Running(self.parts[0].name, share.binding, dtype)
        self.names = names
        for local in names:
            held = share.tensors[local]
            load: Callable[..., Any] | None = None
            if held.n is not None or held.k is not None:
                load = weight_loader
                if self.parts[0].rank is not None:
                    load = self._putting(local, held.n)
            loader = noting(self.arrivals, local, load)
            layer.register_parameter(local, parameter(held, share, loader))

    def _putting(self, local: str, dim: int | None) -> Callable[..., None]:
        """A loader that puts a rank's part, all of it, after those before it along ``dim``."""
        entries = [part.locals(0)[local] for part in self.parts]

        def load(param: Parameter, tensor: torch.Tensor, *shard: Any, **more: Any) -> None:
            if dim is None:
                param.data.copy_(tensor)
                return
            index = part_of(shard[0] if shard else more.get("loaded_shard_id"))
            first = sum(entry.spec.shape[dim] for entry in entries[:index])
            param.data.narrow(dim, first, tensor.shape[dim]).copy_(tensor)

        return load

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.arrivals.all_came()
        biased = any("bias" in source.beside for part in self.parts for source in part.sources)
        if biased != (getattr(layer, "bias", None) is not None):
            raise VerificationError(
                f"module {self.parts[0].name}: "
                f"{'has a bias' if biased else 'has no bias'}, unlike vLLM's model"
            )
        assert self.running is not None
        self.running.prepare(self.tensors(layer))

    def tensors(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The layout's tensors by local name."""
        return {local: getattr(layer, local).data for local in self.names}

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert self.running is not None
        return self.running(self.tensors(layer), x, bias)


@register_weight_loader_v2_supported_method
class PlainLinear(UnquantizedLinearMethod):
    """A layer that is not quantised, vLLM's own way, but for one thing: its weight must come."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.came: set[Any] = set()

    def create_weights(self, layer: torch.nn.Module, *args: Any, **more: Any) -> None:
        load = more["weight_loader"]

        def loader(param: Parameter, tensor: torch.Tensor, *shard: Any, **named: Any) -> None:
            self.came.add(shard[0] if shard else named.get("loaded_shard_id"))
            load(param, tensor, *shard, **named)

        more["weight_loader"] = loader
        super().create_weights(layer, *args, **more)
        self.parts = len(getattr(layer, "output_sizes", [1]))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        whole = None in self.came or any(isinstance(shard, tuple) for shard in self.came)
        if not (whole or loaded_elsewhere()) and len(self.came) < self.parts:
            raise VerificationError(
                f"module {self.name}: vLLM loaded no weight for it; the checkpoint lacks it, or "
                "vLLM's model has no such name"
            )
        super().process_weights_after_loading(layer)
