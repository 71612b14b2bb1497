"""Loads a converted checkpoint: its modules alone, or the transformers model around them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ctconvert import device as devices
from ctconvert.comparison import find_layout
from ctconvert.dtypes import torch_dtype
from ctconvert.errors import ConversionError, UsageError
from ctconvert.quantization import QuantizationSettings, config_of_method, with_config
from ctconvert.restoring import recorded_part, restored_config
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.modules import FusedPart, KernelEmbedding, KernelLinear, TiedHead
from ctconvert.stacking import stacked_spec
from ctconvert.verification import Output

#: Tensors a model need not have a place for: scales of a quantised KV cache, and what older files
#: hold of rotary embeddings, which transformers computes.
_UNUSED = ("k_scale", "v_scale", "q_scale", "inv_freq")

Modules = dict[str, KernelLinear | KernelEmbedding]


def bindings(output: Output) -> dict[str, Binding]:
    """What each converted module is, from the manifest and the original quantization_config.

    Raises:
        VerificationError: the manifest names a layout this program does not know.
    """
    settings = QuantizationSettings.parse(
        restored_config(output.folder), str(output.folder / "config.json")
    )
    found = {}
    for name, record in output.manifest["modules"].items():
        find_layout(name, record["layout"], record["layout_version"])
        parts = [recorded_part(item, record, settings).part for item in record["parts"]]
        spec = stacked_spec([part.spec for part in parts])
        n, k = record["details"].get("padded_shape", (spec.n, spec.k))
        found[name] = Binding(
            layout=record["layout"],
            spec=spec,
            padded=(n, k),
            widths=tuple(part.spec.n for part in parts),
        )
    return found


class Loader:
    """A converted checkpoint, open: its modules and tensors, read straight to the device by name.

    Args:
        out: a converted checkpoint.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.

    Raises:
        UsageError: there is no such directory or device.
        VerificationError: the manifest is damaged or does not fit the files.
    """

    def __init__(self, out: str | Path, device: str = "auto") -> None:
        self.output = Output(Path(out))
        self.device = devices.resolve(device)
        self.bindings = bindings(self.output)
        self._stack = ExitStack()
        self._files = {
            name: self._stack.enter_context(
                safe_open(self.output.folder / name, "pt", device=str(self.device))
            )
            for name in self.output.manifest["files"]
            if name.endswith(".safetensors")
        }

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def sizes(self) -> dict[str, int]:
        """Bytes of every converted module."""
        modules, tensors = self.output.manifest["modules"], self.output.tensors
        return {
            name: sum(tensors[full].nbytes for full in record["tensors"])
            for name, record in modules.items()
        }

    def tensor(self, name: str, file: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[file].get_tensor(name)
        return tensor

    def modules(self, name: str) -> Modules:
        """The modules of one converted module: itself, or ``NAME.e`` for each expert of a 3-D one.

        Tensors go from the file to the device once; on the CPU they stay mapped.
        """
        binding, record = self.bindings[name], self.output.manifest["modules"][name]
        beside = {local for part in record["parts"] for local in part["beside"]}
        tensors, bias = {}, None
        for full, entry in record["tensors"].items():
            local = full.rpartition(".")[2]
            if local in beside:
                bias = self.tensor(full, entry["file"]) if local == "bias" else bias
            else:
                tensors[local] = self.tensor(full, entry["file"])
        kind = KernelEmbedding if binding.spec.embedding else KernelLinear
        if record["experts"] is None:
            return {name: kind(binding, tensors, bias)}
        found: Modules = {}
        for index in range(record["experts"]):
            one = {local: tensor[index] for local, tensor in tensors.items()}
            found[f"{name}.{index}"] = kind(binding, one, None if bias is None else bias[index])
        return found


def load(out: str | Path, device: str = "auto") -> Modules:
    """The converted modules of a checkpoint, by name, ready to be called.

    Tensors go from the file to the device once; on the CPU they stay mapped. The expert ``e`` of a
    3-D module is under ``NAME.e``. :class:`Loader` gives them one at a time.

    Args:
        out: a converted checkpoint.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.

    Raises:
        UsageError: there is no such directory or device.
        VerificationError: the manifest is damaged or does not fit the files.
    """
    with Loader(out, device) as loader:
        return _all_modules(loader)


def _all_modules(loader: Loader) -> Modules:
    return {
        name: module for whole in loader.bindings for name, module in loader.modules(whole).items()
    }


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Makes modules without memory for their parameters; buffers are made as usual."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_model(
    out: str | Path, device: str = "auto", dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """The transformers model of a checkpoint, its converted modules in place, and its tokenizer.

    Args:
        out: a converted checkpoint.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.
        dtype: of activations and unconverted weights, float16 or bfloat16; the config's where None.

    Returns:
        the model, in evaluation mode, and the tokenizer (None where the checkpoint has none).

    Raises:
        ConversionError: transformers' model has no place for a tensor, or one is left empty.
        UsageError: a dtype that no kernel takes; and as :func:`load`.
        VerificationError: as :func:`load`.
    """
    with Loader(out, device) as loader:
        return _model(loader, dtype)


def _model(loader: Loader, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    output = loader.output
    raw = json.loads((output.folder / "config.json").read_bytes())
    if found := config_of_method(raw, "ctconvert"):
        raw = with_config(raw, found[0], None)
    raw.pop("quantization_config", None)
    if "model_type" not in raw:
        raise UsageError(
            f"{output.folder / 'config.json'}: no model_type, so no transformers model"
        )
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    wanted = dtype or getattr(config, "dtype", None) or torch.bfloat16
    if wanted not in (torch.float16, torch.bfloat16):
        raise UsageError(
            f"the kernels take float16 and bfloat16 activations, not {wanted}: pass "
            "dtype=torch.bfloat16"
        )
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    modules = _all_modules(loader)
    for name, module in modules.items():
        spec = module.binding.spec
        if isinstance(module, KernelEmbedding):
            module.dtype = wanted
        elif spec.element in ("F16", "BF16") and torch_dtype(spec.element) != wanted:
            held = torch_dtype(spec.element)
            raise UsageError(
                f"module {name}: weights of {str(held).removeprefix('torch.')} multiply "
                f"activations of that dtype only: pass dtype={held}"
            )
    _put_modules(model, output, modules)
    for name, entry in output.manifest["tensors"].items():
        _put_tensor(model, name, loader.tensor(name, entry["file"]), wanted)
    _tie(model, modules)
    empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if empty:
        raise ConversionError(f"{output.folder}: holds no tensor for {empty[0]} of the model")
    model.eval().to(loader.device)
    tokenizer = None
    if (output.folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(output.folder)
    generation = output.folder / "generation_config.json"
    if generation.exists():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(output.folder)
    return model, tokenizer


def _put_modules(model: nn.Module, output: Output, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parts = output.manifest["modules"].get(name, {}).get("parts", [])
        if len(parts) < 2:
            _replace(model, name, module)
            continue
        assert isinstance(module, KernelLinear)
        shared: dict[str, Any] = {}
        for index, part in enumerate(parts):
            _replace(model, part["name"], FusedPart(module, index, shared))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        replaced = type(model.get_submodule(name))
    except AttributeError:
        raise ConversionError(f"module {name}: {type(model).__name__} has no such module") from None
    if replaced not in (nn.Linear, nn.Embedding):
        # A class of its own may do more, as Gemma's embedding, which scales what it looks up.
        raise ConversionError(
            f"module {name}: a kernel cannot stand for {replaced.__name__}, which is no plain "
            "Linear or Embedding; ctconvert.runtime.load gives the modules by themselves"
        )
    setattr(owner, leaf, module)


def _put_tensor(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        owner = None
    if owner is not None and leaf in owner._parameters:
        value = tensor.to(dtype) if tensor.is_floating_point() else tensor
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    elif owner is not None and leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    elif leaf not in _UNUSED:
        raise ConversionError(f"tensor {name}: {type(model).__name__} has no place for it")


def _tie(model: Any, modules: Modules) -> None:
    """Gives a tied head its weight: the embedding's, or a view of the quantised table."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or isinstance(head, KernelLinear):
        return
    if isinstance(embedding, KernelEmbedding):
        model.set_output_embeddings(TiedHead(embedding))
    elif head.weight.is_meta:
        head.weight = embedding.weight
