"""The method of vLLM's fused experts: stacked tensors, or one by one, as the converter wrote them.

Parameters are ``w13_*`` (gate, then up) and ``w2_*``, [experts of this rank, ...]. A stacked tensor
is copied once: its rank's experts, rows or columns of it. vLLM's own loader passes over names that
it does not know and takes tensors that are too small: none of it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ctconvert import assembly, layouts
from ctconvert.assembly import leaves
from ctconvert.errors import UsageError, VerificationError
from ctconvert.integrations.vllm.arrivals import Arrivals
from ctconvert.integrations.vllm.cuts import Held, axes, uncut, unfit
from ctconvert.integrations.vllm.engine.experts import fused
from ctconvert.integrations.vllm.running import Running, tell
from ctconvert.integrations.vllm.served import UNREAD, Served
from ctconvert.records import Convert
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.loading import binding
from ctconvert.store.safetensors import TensorEntry
from ctconvert.transforms.dtypes import torch_dtype

#: What vLLM's names make of the gate [..., I], before the product with up.
_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def method(served: Served, layer: Any, prefix: str) -> FusedMoEMethodBase | None:
    """The method of a layer of experts; None, for vLLM's own way, where they are not quantised.

    Raises:
        UsageError: this plugin does not run such experts.
        VerificationError: some of them are converted and some are not.
    """
    prefix = prefix.removesuffix(".routed_experts")
    mine = {
        name.removeprefix(f"{prefix}."): module
        for name, module in served.modules.items()
        if name.startswith(f"{prefix}.")
    }
    if not mine:
        return None
    given = served.rank is not None and served.plan.options.expert_parallel
    if served.rank is not None and layer.moe_config.moe_parallel_config.use_ep != given:
        cut = "whole experts to ranks" if given else "a share of every expert to ranks"
        raise UsageError(
            f"module {prefix}: the checkpoint gives {cut}: serve it "
            f"{'with' if given else 'without'} --enable-expert-parallel"
        )
    gate, up, down = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
    count = layer.moe_config.num_logical_experts
    if mine.keys() == {"w13", "w2"}:
        whole = {"w13": [[mine["w13"]]], "w2": [[mine["w2"]]]}
        return Experts(layer, prefix, whole, served.hashes)
    numbers = list(range(count))
    if given:
        numbers = sorted({int(name.partition(".")[0]) for name in mine})
    wanted = {f"{expert}.{leaf}" for expert in numbers for leaf in (gate, up, down)}
    if odd := mine.keys() ^ wanted:
        raise VerificationError(
            f"module {prefix}: vLLM's model has {count} experts with {gate}, {up} and {down}, and "
            f"{prefix}.{min(odd)} is {'one more' if min(odd) in mine else 'not converted'}"
        )
    # An expert that another rank has is never asked for: the first of this one's stands there.
    known = [number if number in numbers else numbers[0] for number in range(count)]
    apart = {
        "w13": [[mine[f"{e}.{gate}"], mine[f"{e}.{up}"]] for e in known],
        "w2": [[mine[f"{e}.{down}"]] for e in known],
    }
    return Experts(layer, prefix, apart, served.hashes)


@dataclass(frozen=True)
class Stack:
    """w13 or w2 on this rank: what one expert is, and how its tensors are cut.

    ``axis`` is what ranks cut, ``widths`` the rows of the parts as they are stored: gate and up, or
    down. ``experts`` are the manifest's modules: a list of parts an expert, or one stack.
    """

    name: str
    experts: list[list[Convert]]
    running: Running
    tensors: dict[str, Held]
    axis: str
    widths: tuple[int, ...]
    stacked: bool

    def dim(self, local: str) -> int | None:
        """The dimension of one expert's tensor that ranks cut."""
        return getattr(self.tensors[local], self.axis)

    def expected(self, local: str, ids: Iterable[int]) -> dict[tuple[str, int], TensorEntry]:
        """The tensors that fill a parameter, by (its name, place in order)."""
        cut = len(self.experts[0][0].prefix)
        name = f"{self.name}_{local}"
        if self.stacked:
            outputs = self.experts[0][0].outputs
            return {(name, 0): next(one for one in outputs if one.name[cut:] == local)}
        each = len(self.experts[0])
        return {
            (name, each * expert + place): part.locals(0)[local]
            for expert in ids
            for place, part in enumerate(self.experts[expert])
        }


def _stack(
    name: str,
    experts: list[list[Convert]],
    sizes: tuple[list[int], int],
    rank: tuple[list[int], int],
    dtype: torch.dtype,
) -> Stack:
    """w13 or w2 of ``sizes`` (rows of each part, K), ``rank`` being this rank's.

    Raises:
        UsageError: it is of another size, or cannot be joined or cut like that.
    """
    parts = experts[0]
    bound = [binding(part) for part in parts]
    layout = layouts.get(bound[0].layout)
    assert layout is not None
    stacked = parts[0].experts is not None
    rows, columns = sizes
    where = parts[0].name
    for expert in experts[1:]:
        for one, first in zip(expert, parts, strict=True):
            if one.recipe != first.recipe:
                raise UsageError(f"module {one.name}: of another layout or scheme than {where}")
    if any("bias" in part.beside for expert in experts for part in expert):
        raise UsageError(f"module {where}: this plugin runs no experts with biases")
    if not (support := assembly.can_join([one.spec for one in bound])):
        raise UsageError(f"module {where}: vLLM stacks gate and up, but {support.reason}")
    spec = assembly.joined([one.spec for one in bound])
    padded_n = sum(one.padded[0] for one in bound)
    padded_k = bound[0].padded[1]
    widths = tuple(padded_n // len(rows) for _ in rows)
    if spec.k != columns or any(have < want for have, want in zip(widths, rows, strict=True)):
        raise UsageError(
            f"module {where}: {spec.n} x {spec.k} in the manifest, {rows} x {columns} in vLLM's "
            "model"
        )
    held = assembly.padded(spec, padded_n, padded_k)
    tensors = {local: Held(made) for local, made in layout.output_specs(held).items()}
    if sizes != rank or len(parts) > 1:
        whole = [Binding(layout.name, spec, (padded_n, padded_k), widths)]
        reason = ""
        if sizes != rank:
            reason = "it is padded" if (padded_n, padded_k) != (sum(rows), columns) else ""
            widths = tuple(rank[0])
            padded_n, padded_k = sum(widths), rank[1]
            held = assembly.padded(spec, padded_n, padded_k)
            reason = reason or unfit(layout, spec, held)
        else:  # each part is padded by itself, and their tiles stand beside one another
            whole = [replace(whole[0], spec=held)]
        if reason := reason or uncut(layout, whole, held, widths, rank[1]):
            raise UsageError(
                f"module {where}: layout {layout.name} cannot be joined or cut to {list(widths)} x "
                f"{rank[1]}: {reason}; use fewer ranks, or convert with --fuse"
            )
        tensors = axes(layout, held)
    mine = Binding(
        layout.name, assembly.padded(spec, padded_n, rank[1]), (padded_n, padded_k), widths
    )
    return Stack(
        name=name,
        experts=experts,
        running=Running(where, mine, dtype, prepared=False),
        tensors={k: v for k, v in tensors.items() if not k.endswith(UNREAD)},
        axis="n" if name == "w13" else "k",
        widths=widths,
        stacked=stacked,
    )


class Experts(FusedMoEMethodBase):
    """Experts that are converted; nothing is left to do after loading."""

    supports_pre_processed_weights = True

    def __init__(
        self,
        layer: Any,
        name: str,
        modules: dict[str, list[list[Convert]]],
        hashes: Mapping[str, str],
    ) -> None:
        super().__init__(layer.moe_config)
        self.name, self.modules, self.hashes = name, modules, hashes
        kind = getattr(layer.activation, "value", layer.activation)
        limited = any(
            getattr(layer, f"swiglu_{setting}", None) is not None
            for setting in ("limit", "alpha", "beta")
        )
        if kind not in _ACTIVATIONS or limited:
            raise UsageError(
                f"module {name}: activation {kind}{' with limits' if limited else ''}; this plugin "
                f"runs {', '.join(_ACTIVATIONS)}"
            )
        self.activation = _ACTIVATIONS[kind]

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.size = intermediate_size_per_partition
        parallel = layer.moe_config.moe_parallel_config
        self.rank, self.ranks = parallel.tp_rank, parallel.tp_size
        first = self.modules["w13"][0][0]
        if first.rank is not None:
            self.rank, self.ranks = 0, 1  # the converter has cut them
        full = self.size * self.ranks
        self.w13 = _stack(
            "w13",
            self.modules["w13"],
            ([full, full], hidden_size),
            ([self.size, self.size], hidden_size),
            params_dtype,
        )
        self.w2 = _stack(
            "w2",
            self.modules["w2"],
            ([hidden_size], full),
            ([hidden_size], self.size),
            params_dtype,
        )
        total = extra_weight_attrs["global_num_experts"]
        if total != layer.moe_config.num_logical_experts:
            raise UsageError(f"module {self.name}: experts are not repeated (EPLB) by this plugin")
        places = layer.expert_map.tolist() if layer.expert_map is not None else list(range(total))
        self.places = {expert: place for expert, place in enumerate(places) if place >= 0}
        held, wanted = first.experts or len(self.modules["w13"]), total
        if parallel.use_ep and first.rank is not None and first.experts is not None:
            self.places = self._stacked_places(first)
            wanted = num_experts
        if held != wanted:
            raise UsageError(
                f"module {self.name}: {held} experts in the manifest, {wanted} in vLLM's model"
            )
        expected: dict[tuple[str, int], TensorEntry] = {}
        for stack in (self.w13, self.w2):
            for local, one in stack.tensors.items():
                expected |= stack.expected(local, self.places)
                shape = (num_experts, *one.spec.shape)
                data = torch.empty(shape, dtype=torch_dtype(one.spec.dtype))
                parameter = Parameter(data, requires_grad=False)
                parameter.weight_loader = partial(self._load, stack, local)  # type: ignore[attr-defined]
                layer.register_parameter(f"{stack.name}_{local}", parameter)
        up, down = self.w13.running, self.w2.running
        self.fused = fused(up.bound, down.bound, hidden_size, params_dtype)
        self.by = "vLLM's fused_marlin_moe" if self.fused else up.by
        self.arrivals = Arrivals(expected, self.hashes)
        layer.load_weights = partial(self._load_all, layer)

    def _stacked_places(self, stack: Convert) -> dict[int, int]:
        """The places in a rank's own stack, which must hold the experts that vLLM gives it."""
        numbers = []
        for unit in stack.units:
            name = stack.sources[next(leaves(unit)).source].name
            numbers.append(int(name.rpartition("experts.")[2].partition(".")[0]))
        if self.places != {expert: place for place, expert in enumerate(numbers)}:
            raise UsageError(
                f"module {self.name}: the checkpoint gives this rank the experts {numbers[0]} to "
                f"{numbers[-1]}, vLLM others: use its linear placement"
            )
        return {place: place for place in range(len(numbers))}

    def _load_all(self, layer: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """Loads tensors by the checkpoint's names below ``experts``; yields the parameters'."""
        shards = {
            layer.ckpt_gate_proj_name: "w1",
            layer.ckpt_up_proj_name: "w3",
            layer.ckpt_down_proj_name: "w2",
        }
        for name, tensor in weights:
            number, _, rest = name.partition(".")
            where, shard, expert = name, None, None
            if number.isdecimal():
                leaf, _, local = rest.partition(".")
                shard, expert = shards.get(leaf), int(number)
                where = f"{'w2' if shard == 'w2' else 'w13'}_{local}"
            parameter = layer._parameters.get(where)
            if parameter is None:
                raise VerificationError(f"tensor {self.name}.{name}: no parameter takes it")
            parameter.weight_loader(parameter, tensor, shard_id=shard, expert_id=expert)
            yield where

    def _load(
        self,
        stack: Stack,
        local: str,
        parameter: Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str = "",
        shard_id: str | None = None,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool:
        """A tensor of one expert's part, or of all experts where there is no ``expert_id``."""
        name, data = f"{stack.name}_{local}", parameter.data
        if expert_id is None:
            self.arrivals.check((name, 0), loaded_weight)
            if self.ranks == 1 and len(self.places) == len(loaded_weight):
                data.copy_(loaded_weight.view(data.shape))
                return True
            for expert, place in self.places.items():
                source = loaded_weight[expert].reshape(-1, *loaded_weight.shape[2:])
                for index in range(len(stack.widths)):
                    self._copy(stack, local, data[place], source, index, len(stack.widths))
            return True
        if expert_id not in self.places:
            return True  # another rank's
        index, parts = (1 if shard_id == "w3" else 0), len(stack.experts[0])
        key = (name, parts * expert_id + index)
        self.arrivals.check(key, loaded_weight)
        place = self.places[expert_id]
        shared = parts > 1 and stack.tensors[local].n is None
        if shared and (name, parts * expert_id + 1 - index) in self.arrivals.came:
            if not torch.equal(data[place], loaded_weight.to(data.device)):
                entry = self.arrivals.expected[key]
                raise VerificationError(
                    f"tensor {entry.name}: differs from {'up' if index == 0 else 'gate'}'s, and "
                    "their kernel takes one"
                )
            return True
        self._copy(stack, local, data[place], loaded_weight, index, 1)
        return True

    def _copy(
        self,
        stack: Stack,
        local: str,
        target: torch.Tensor,
        source: torch.Tensor,
        index: int,
        held: int,
    ) -> None:
        """Copies part ``index`` of an expert; ``source`` holds ``held`` parts, this one or all."""
        parts = len(stack.widths)
        rows = stack.tensors[local].n
        if parts > 1 and rows is not None:
            size = target.shape[rows] // parts
            target = target.narrow(rows, index * size, size)
        if held > 1 and rows is not None:
            size = source.shape[rows] // held
            source = source.narrow(rows, index * size, size)
        dim = stack.dim(local)
        if self.ranks > 1 and dim is not None:
            size = source.shape[dim] // self.ranks
            source = source.narrow(dim, self.rank * size, size)
        target.copy_(source.view(target.shape) if source.numel() == 1 else source)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.arrivals.all_came()
        tell(self.w13.running.bound, self.by, "experts in ")

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [M, H] to [M, H], this rank's share of the sum over ranks."""
        if self.fused is not None:
            up, down = self._tensors(layer, self.w13), self._tensors(layer, self.w2)
            return self.fused(layer, up, down, x, topk_weights, topk_ids)
        ids, weights = topk_ids.flatten().long(), topk_weights.flatten()
        if layer.expert_map is not None:
            ids = layer.expert_map[ids].long()
            weights = weights.masked_fill(ids < 0, 0)  # another rank's: a row that counts nothing
            ids = ids.clamp(min=0)
        if layer.apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise UsageError(f"module {self.name}: several experts a token weigh no input")
            x, weights = x * topk_weights.to(x.dtype), (weights != 0).to(weights.dtype)
        order = ids.argsort(stable=True)
        ids, rows = ids[order], order // topk_ids.shape[1]
        bounds = torch.arange(layer.local_num_experts + 1, device=ids.device)
        offsets = torch.searchsorted(ids, bounds).int()
        gate, up = self._matmul(layer, self.w13, x, rows, offsets).split(
            list(self.w13.widths), dim=-1
        )
        inner = self.activation(gate[:, : self.size]) * up[:, : self.size]
        every = torch.arange(len(rows), device=rows.device)
        out = self._matmul(layer, self.w2, inner.contiguous(), every, offsets)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        total.index_add_(0, rows, out.float() * weights[order].float().unsqueeze(1))
        return total.to(x.dtype)

    def _tensors(self, layer: Any, stack: Stack) -> dict[str, torch.Tensor]:
        return {local: getattr(layer, f"{stack.name}_{local}").data for local in stack.tensors}

    def _matmul(
        self,
        layer: Any,
        stack: Stack,
        x: torch.Tensor,
        rows: torch.Tensor,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        """[P, N]: row p is x[rows[p]] times the weight of the expert that ``offsets`` give it."""
        running = stack.running
        tensors = self._tensors(layer, stack)
        kernel = running.kernel
        grouped = None if kernel is None else kernel.grouped(running.bound.spec)
        if grouped is not None:
            return grouped(running.bound, tensors, x, rows.int(), offsets, None)
        found = x.new_empty((len(rows), running.bound.spec.n))
        edges = offsets.tolist()
        for expert in range(len(edges) - 1):
            mine = slice(edges[expert], edges[expert + 1])
            if mine.start < mine.stop:
                one = {local: tensor[expert] for local, tensor in tensors.items()}
                found[mine] = running(one, x[rows[mine]], None)
        return found
