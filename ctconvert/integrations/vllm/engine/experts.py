"""vLLM's fused Marlin mixture of experts, called directly: its choosers prefer other layouts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ctconvert.integrations.vllm import engine
from ctconvert.integrations.vllm.engine import base, marlin
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import Tensors

#: ``(layer, w13's tensors, w2's, x [M, H], weights [M, T], ids [M, T])`` to [M, H].
Fused = Callable[[Any, Tensors, Tensors, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def fused(w13: Binding, w2: Binding, hidden: int, dtype: torch.dtype) -> Fused | None:
    """vLLM's kernel for experts in Marlin's tiles, or None where it does not run them.

    Args:
        w13, w2: one expert's gate and up, and its down, on this rank.
        hidden: H, which the kernel takes unpadded.
        dtype: of the activations.
    """
    name = marlin.codes(w13, dtype)
    if not engine.wanted() or name is None or name != marlin.codes(w2, dtype):
        return None
    if any(one.spec.has_g_idx or (one.spec.kind == "int" and one.spec.side) for one in (w13, w2)):
        return None
    inner = w2.padded[1]
    if w13.padded != (2 * inner, hidden) or w2.padded[0] != hidden:
        return None
    if base.capability() < 80 or base.op("moe_wna16_marlin_gemm", "_moe_C") is None:
        return None
    try:
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    except ImportError:
        return None
    number = marlin.scalar_type(name)
    # Versions that take act-order make their locks on every call, others keep them.
    locks = "g_idx1" in inspect.signature(fused_marlin_moe).parameters
    workspace: torch.Tensor | None = None

    def run(
        layer: Any,
        up: Tensors,
        down: Tensors,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        nonlocal workspace
        if locks and workspace is None:
            workspace = marlin.locks(x.device)
        one, two = marlin.held(w13, up), marlin.held(w2, down)
        factors = [held["global_scale"] for held in (one, two)]
        first, second = (None if factor is None else factor.flatten() for factor in factors)
        return fused_marlin_moe(
            hidden_states=x.contiguous(),
            w1=one["b_q_weight"],
            w2=two["b_q_weight"],
            bias1=None,
            bias2=None,
            w1_scale=one["b_scales"],
            w2_scale=two["b_scales"],
            topk_weights=weights.float(),
            topk_ids=ids,
            quant_type_id=number,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            global_num_experts=layer.global_num_experts,
            activation=layer.activation,
            expert_map=layer.expert_map,
            global_scale1=first,
            global_scale2=second,
            w1_zeros=one["b_zeros"],
            w2_zeros=two["b_zeros"],
            workspace=workspace,
        )

    return run
