"""vLLM's plugin: ``vllm serve OUT`` runs a converted checkpoint as it is.

The entry point ``vllm.general_plugins`` names :func:`register`, which vLLM calls in every process.
Kernels, layouts and torch are imported when a checkpoint asks for them.
"""

from __future__ import annotations


def register() -> None:
    """Makes ``quant_method: ctconvert`` known to vLLM; may be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ctconvert.integrations.vllm.config import CtconvertConfig

    register_quantization_config("ctconvert")(CtconvertConfig)
