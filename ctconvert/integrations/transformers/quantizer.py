"""The quantizer that transformers calls while it loads a converted checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import dot_natural_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ctconvert.errors import ConversionError, UsageError, VerificationError
from ctconvert.integrations.transformers.names import Exactly, Names
from ctconvert.integrations.transformers.placing import Placed
from ctconvert.output import Output
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.hub import hub_failures
from ctconvert.store.local import LocalStore
from ctconvert.transforms.dtypes import torch_dtype


@register_quantization_config("ctconvert")
class CtconvertConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a converted checkpoint, as it is.

    Nothing is decided by it: what a module is, the manifest says.
    """

    def __init__(self, quant_method: str = "ctconvert", **settings: Any) -> None:
        self.quant_method = quant_method
        for name, value in settings.items():
            setattr(self, name, value)


@register_quantizer("ctconvert")
class CtconvertQuantizer(HfQuantizer):
    """Puts kernels into the model and gives transformers' loader the names of their tensors.

    ``from_pretrained`` then fails, with the name, where a tensor of the checkpoint has no place in
    the model or a weight of the model is in no tensor of the checkpoint.

    Raises:
        UsageError: a dtype that the kernels do not take; tensor parallelism; no kernel.
        VerificationError: the manifest is missing, damaged or does not fit the files.
        ConversionError: the checkpoint does not fit the model.
    """

    requires_calibration = True
    _placed: Placed
    _output: Output
    _complete = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called with what is asked for, and again with what transformers makes of ``auto``."""
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise UsageError(
                "converted checkpoints are not offloaded: choose a device_map that holds the whole "
                f"model, without {'disk' if 'disk' in places else 'cpu'}"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (torch.float16, torch.bfloat16):
            raise UsageError(
                f"the kernels take float16 and bfloat16 activations, not {dtype}: pass "
                "dtype=torch.bfloat16"
            )
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UsageError("a converted checkpoint is not split over devices by transformers")
        if not checkpoint_files:
            raise UsageError("a converted checkpoint is loaded from its own files only")
        self._output = _opened([Path(file) for file in checkpoint_files], model.config)
        self._placed = Placed(model, self._output.plan, model.config.dtype)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Transformers' own, around which the converted tensors go straight to their place.

        Older versions do not hand over the model; it is the one that was prepared.
        """
        names = self._placed.names
        found = [Exactly(names, shows=False), *weight_conversions, Exactly(names, shows=True)]
        # A copy: some of them remember what they have renamed.
        self._check_complete(self._placed.model, copy.deepcopy(found))
        self._complete = True
        return found

    def _check_complete(self, model: Any, conversions: list[Any]) -> None:
        """Transformers warns of what is missing or left over; here it is an error.

        Raises:
            ConversionError: a tensor has no place, or a parameter no tensor.
        """
        plan, where = self._output.plan, self._output.where
        rules = Names(model, conversions)
        filled: dict[str, str] = {}
        for name in sorted(plan.entries, key=dot_natural_key):
            key, pattern = rules.renamed(name)
            if key not in rules.tensors:
                if name in self._placed.unused or rules.ignored(name):
                    continue
                raise ConversionError(f"tensor {name}: {rules.kind} has no place for it")
            shape = plan.entries[name].spec.shape
            if pattern is None:
                if key in filled:
                    raise ConversionError(
                        f"{where}: {filled[key]} and {name} both are {key} of {rules.kind}"
                    )
                if shape != tuple(rules.tensors[key].shape):
                    raise ConversionError(
                        f"tensor {name}: it is {list(shape)}, and {key} of {rules.kind} is "
                        f"{list(rules.tensors[key].shape)}"
                    )
            filled[key] = name
        tied: dict[str, str] = model.all_tied_weights_keys
        optional = {name for name, _ in model.named_buffers()} - set(self._placed.names.values())
        for key in rules.tensors:
            others = {tied.get(key, key), *(target for target, own in tied.items() if own == key)}
            others |= {target for target, own in tied.items() if own == tied.get(key)}
            if key not in filled and not others & filled.keys() and key not in optional:
                raise ConversionError(f"{where}: holds no tensor for {key} of the model")

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """What is converted keeps its dtype, whatever the model wants of a module of that name."""
        sources = getattr(converter, "_original_source_patterns", ())
        if any(source in self._placed.names for source in sources):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self._complete:
            raise UsageError("this version of transformers did not ask for the tensors' names")
        self._output.check_unchanged()  # what was loaded is what the manifest means
        for name, entry in self._placed.entries.items():
            path, _, leaf = self._placed.names[name].rpartition(".")
            tensor = model.get_submodule(path).get_buffer(leaf)
            if tensor.is_meta:
                raise UsageError(
                    f"tensor {name}: it was not loaded; converted checkpoints are not offloaded, "
                    "so choose a device_map that holds the whole model"
                )
            if tensor.dtype != torch_dtype(entry.spec.dtype) or tensor.shape != entry.spec.shape:
                raise ConversionError(
                    f"tensor {name}: transformers made {tensor.dtype} {list(tensor.shape)} of "
                    f"{entry.spec}"
                )
        for kernel in self._placed.kernels.values():
            kernel.refresh()
        model.requires_grad_(False)  # no kernel has a backward pass
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) < 2:
            self._check_loaded(model)
        return model

    def _check_loaded(self, model: Any) -> None:
        """Transformers marks what it has loaded, or tied; what it made up has no mark.

        Raises:
            ConversionError: a parameter was not loaded.
        """
        for name, parameter in model.named_parameters():
            if parameter.is_meta or not getattr(parameter, "_is_hf_initialized", False):
                raise ConversionError(f"{self._output.where}: {name} of the model was not loaded")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The checkpoint it was loaded from is the one to keep."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _opened(files: list[Path], config: Any) -> Output:
    """The checkpoint that these files are the weights of.

    Raises:
        VerificationError: they are not all of its weights, or the manifest is damaged.
        UsageError: it cannot be fetched from the Hub, or is cut for several ranks.
    """
    folder = files[0].parent
    if folder.parent.name == "snapshots":  # of the Hub's cache, which holds what was asked for
        if not (folder / MANIFEST).exists():
            _fetch_manifest(folder, str(config.name_or_path))
        output = Output(LocalStore(folder), whole=False)
    else:
        output = Output.open(folder)
    found, wanted = {file.name for file in files}, {shard.name for shard in output.plan.shards}
    if output.plan.kind != "converted":
        raise VerificationError(f"{folder}: it is a restored checkpoint, not a converted one")
    if (ranks := output.plan.options.tensor_parallel) > 1:
        raise UsageError(
            f"{folder}: cut for {ranks} ranks, which transformers does not load; convert it "
            "without --tensor-parallel"
        )
    if found != wanted:
        odd = sorted(found ^ wanted)[0]
        raise VerificationError(f"{folder / odd}: it and the manifest do not belong together")
    return output


def _fetch_manifest(folder: Path, repository: str) -> None:
    from huggingface_hub import hf_hub_download

    with hub_failures(repository):
        hf_hub_download(
            repository, MANIFEST, revision=folder.name, cache_dir=folder.parent.parent.parent
        )
