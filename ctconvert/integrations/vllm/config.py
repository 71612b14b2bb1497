"""The quantisation config that vLLM makes of ``quant_method: ctconvert``."""

from __future__ import annotations

import re
from typing import Any

import torch
import vllm
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from ctconvert.errors import UsageError
from ctconvert.integrations.vllm.served import UNREAD, Served
from ctconvert.records import rank_prefix

logger = init_logger("vllm.ctconvert")

#: Versions of vLLM that the plugin's tests pass with; another is told of, once.
TESTED = ("0.26.0", "0.32.0")


class _OwnRank:
    """A renaming of vLLM's mappers: takes the prefix of a rank away."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def rename_source_key(self, source_key: str) -> tuple[str, None]:
        return source_key.removeprefix(self.prefix), None


class CtconvertConfig(QuantizationConfig):
    """Gives every layer its method by the manifest; config.json says only that there is one."""

    def __init__(self) -> None:
        super().__init__()
        self._served: Served | None = None

    @property
    def served(self) -> Served:
        if self._served is None:
            raise UsageError("vLLM did not say where the checkpoint lies: use vLLM 0.26 or newer")
        if self._served.ranks > 1:
            parallel = get_tp_group()
            self._served.of_rank(parallel.rank_in_group, parallel.world_size)
        return self._served

    def get_name(self) -> str:
        return "ctconvert"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # a layout's kernel says what it needs

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CtconvertConfig:
        if vllm.__version__ not in TESTED:
            logger.warning_once(
                "ctconvert's plugin was tested with vLLM %s; this is %s",
                ", ".join(TESTED),
                vllm.__version__,
            )
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Opens and checks the checkpoint, before anything is allocated."""
        self._served = Served(model_name, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.served.rename(hf_to_vllm_mapper.apply_list)

    def get_cache_scale_mapper(self) -> Any:
        """Drops what no kernel reads and what other ranks have; 0.26 asks for this mapper alone."""
        from vllm.model_executor.models.utils import WeightsMapper

        served = self.served
        ends = {
            entry.name[len(module.prefix) - 1 :]  # with the joint before the local name
            for module in served.plan.modules
            for entry in module.outputs
            if entry.name.endswith(UNREAD)
        }
        unread = WeightsMapper(orig_to_new_suffix=dict.fromkeys(sorted(ends)))
        found = super().get_cache_scale_mapper() | unread
        if served.rank is None:
            return found
        if "orig_to_new_renaming" not in WeightsMapper.__dataclass_fields__:
            raise UsageError(f"{served.model}: cut for ranks, which this vLLM cannot load")
        return found | WeightsMapper(
            orig_to_new_renaming=[_OwnRank(rank_prefix(served.rank))],  # before all else
            orig_to_new_regex={re.compile(r"^rank\d+\."): None},
        )

    def get_checkpoint_weight_mapper(self) -> Any:
        """Drops nothing more: act-order's columns are read."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from ctconvert.integrations.vllm import experts, linear, vocabulary

        if isinstance(layer, RoutedExperts):
            return experts.method(self.served, layer, prefix)
        leaf = prefix.rpartition(".")[2]
        joined = self.packed_modules_mapping.get(leaf, [])
        if isinstance(layer, LinearBase):
            parts = self.served.parts(prefix, joined)
            if not parts:
                return linear.PlainLinear(prefix)
            return linear.CtconvertLinear(parts, self.served.hashes)
        if isinstance(layer, VocabParallelEmbedding):
            return vocabulary.method(self.served, layer, prefix)
        return None
