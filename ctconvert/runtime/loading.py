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

from ctconvert.errors import ConversionError, UsageError, VerificationError
from ctconvert.layouts import get as get_layout
from ctconvert.output import Output
from ctconvert.records import Convert
from ctconvert.runtime import kernels
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.modules import (
    FusedPart,
    KernelEmbedding,
    KernelExperts,
    KernelLinear,
    TiedHead,
)
from ctconvert.transforms import device as devices
from ctconvert.transforms.dtypes import torch_dtype

#: Tensors a model need not have a place for: scales of a quantised KV cache, and what older files
#: hold of rotary embeddings, which transformers computes.
_UNUSED = ("k_scale", "v_scale", "q_scale", "inv_freq")

#: What an ``attn_implementation`` or ``experts_implementation`` of a config may name.
_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "batched_mm",
    "grouped_mm",
)

Modules = dict[str, KernelLinear | KernelEmbedding | KernelExperts]


def binding(module: Convert) -> Binding:
    """What a converted module is, as its kernel needs to know it.

    Raises:
        VerificationError: its layout, or this version of it, is not known here.
    """
    recipe = module.recipe
    layout = get_layout(recipe.layout)
    if layout is None or layout.version != recipe.layout_version:
        raise VerificationError(
            f"module {module.name}: layout {recipe.layout} version {recipe.layout_version} is not "
            "known to this ctconvert; use the one that wrote it",
            module=module.name,
        )
    logical = module.logical
    return Binding(
        layout=recipe.layout,
        spec=logical,
        padded=(recipe.weight.n, recipe.weight.k),
        widths=module.widths,
    )


class Loader:
    """A converted checkpoint, open: its modules and tensors, read straight to the device by name.

    Args:
        out: a converted checkpoint, or its directory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.

    Raises:
        UsageError: there is no such directory or device.
        VerificationError: the manifest is damaged or does not fit the files.
        ConversionError: it is no longer the checkpoint that was opened.
    """

    def __init__(self, out: str | Path | Output, device: str = "auto") -> None:
        self.output = out if isinstance(out, Output) else Output.open(out)
        self.device = devices.resolve(device)
        self.folder = Path(self.output.where)
        self.converted = {module.name: module for module in self.output.plan.modules}
        self.bindings = {name: binding(module) for name, module in self.converted.items()}
        self._stack = ExitStack()
        self._files = {
            shard.name: self._stack.enter_context(
                safe_open(self.folder / shard.name, "pt", device=str(self.device))
            )
            for shard in self.output.plan.shards
        }
        try:
            self.output.check_unchanged()  # what is open now is what its manifest means
        except ConversionError:
            self._stack.close()
            raise

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def sizes(self) -> dict[str, int]:
        """Bytes of every converted module."""
        return {
            name: sum(entry.nbytes for entry in module.made)
            for name, module in self.converted.items()
        }

    def tensor(self, name: str, file: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[file].get_tensor(name)
        return tensor

    def modules(self, name: str) -> Modules:
        """The modules of one converted module: itself, or ``NAME.e`` for each expert of a 3-D one.

        Where a kernel runs the experts of a 3-D one together, ``NAME`` is that, of the same
        tensors. Those go from the file to the device once; on the CPU they stay mapped.
        """
        binding, module = self.bindings[name], self.converted[name]
        cut = len(module.prefix)
        tensors = {
            entry.name[cut:]: self.tensor(entry.name, entry.file) for entry in module.outputs
        }
        bias = None
        if (entry := module.beside.get("bias")) is not None:
            bias = self.tensor(entry.name, entry.file)
        kind = KernelEmbedding if binding.spec.embedding else KernelLinear
        if module.experts is None:
            return {name: kind(binding, tensors, bias)}
        found: Modules = {}
        for index in range(module.experts):
            one = {
                local: tensor[index].reshape(tensor.shape[1:] or (1,))
                for local, tensor in tensors.items()
            }
            found[f"{name}.{index}"] = kind(binding, one, None if bias is None else bias[index])
        if kernels.get(binding.layout, binding.spec).grouped(binding.spec) is not None:
            found[name] = KernelExperts(binding, tensors, bias)
        return found


def load(out: str | Path, device: str = "auto") -> Modules:
    """The converted modules of a checkpoint, by name, ready to be called.

    Tensors go from the file to the device once; on the CPU they stay mapped. The expert ``e`` of a
    stack is under ``NAME.e``, and under ``NAME`` all of them as one :class:`KernelExperts` where a
    kernel takes them so. :class:`Loader` gives them one at a time.

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


@contextmanager
def _transformers_errors(where: str) -> Iterator[None]:
    """One line for what transformers makes of a config or a tokenizer that it cannot use."""
    try:
        yield
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        OSError,
        NotImplementedError,
    ) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{where}: transformers cannot load it: {first}") from None


def _check_implementations(value: Any, where: str) -> None:
    """Refuses implementations that transformers would fetch from the Hub and run.

    Raises:
        UsageError: a config names one that is not transformers' own.
    """
    if isinstance(value, list):
        for item in value:
            _check_implementations(item, where)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key.endswith("_implementation"):
            names = item.values() if isinstance(item, dict) else [item]
            for name in names:
                if name is not None and name not in _IMPLEMENTATIONS:
                    raise UsageError(
                        f"{where}: config.json: {key} {name!r} is not one of transformers' own "
                        f"({', '.join(_IMPLEMENTATIONS)}), and code from elsewhere is not run"
                    )
        _check_implementations(item, where)


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

    raw = json.loads(loader.output.plan.source.config)
    for holder in (raw, raw.get("text_config")):
        if isinstance(holder, dict):
            holder.pop("quantization_config", None)
            holder.pop("compression_config", None)
    if "model_type" not in raw:
        raise UsageError(
            f"{loader.folder / 'config.json'}: no model_type, so no transformers model"
        )
    where = str(loader.folder)
    _check_implementations(raw, where)
    with _transformers_errors(where):
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    wanted = dtype or getattr(config, "dtype", None) or torch.bfloat16
    if wanted not in (torch.float16, torch.bfloat16):
        raise UsageError(
            f"the kernels take float16 and bfloat16 activations, not {wanted}: pass "
            "dtype=torch.bfloat16"
        )
    with _parameters_on_meta(), _transformers_errors(where):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
    modules = _all_modules(loader)
    for name, module in modules.items():
        spec = module.binding.spec
        if isinstance(module, KernelEmbedding):
            module.dtype = wanted
        elif spec.element in ("F16", "BF16") and torch_dtype(spec.element) != wanted:
            held = torch_dtype(spec.element)
            raise UsageError(
                f"module {name}: weights of {str(held).removeprefix('torch.')} multiply "
                f"activations of that dtype only: pass dtype={held}",
                module=name,
            )
    _put_modules(model, loader.converted, modules)
    for copy in loader.output.plan.copies:
        _put_tensor(model, copy.name, loader.tensor(copy.name, copy.output.file), wanted)
    _tie(model, modules)
    empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if empty:
        raise ConversionError(f"{loader.folder}: holds no tensor for {empty[0]} of the model")
    model.eval().to(loader.device)
    tokenizer = None
    if (loader.folder / "tokenizer_config.json").exists():
        with _transformers_errors(where):
            tokenizer = AutoTokenizer.from_pretrained(
                loader.folder, trust_remote_code=False, local_files_only=True
            )
    generation = loader.folder / "generation_config.json"
    if generation.exists():
        from transformers import GenerationConfig

        with _transformers_errors(where):
            model.generation_config = GenerationConfig.from_pretrained(
                loader.folder, local_files_only=True
            )
    return model, tokenizer


def _put_modules(
    model: nn.Module, converted: Mapping[str, Convert], modules: Mapping[str, nn.Module]
) -> None:
    for name, module in modules.items():
        parts = converted[name].sources if name in converted else ()
        if len(parts) < 2:
            _replace(model, name, module)
            continue
        assert isinstance(module, KernelLinear)
        shared: dict[str, Any] = {}
        for index, part in enumerate(parts):
            _replace(model, part.name, FusedPart(module, index, shared))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        replaced = type(model.get_submodule(name))
    except AttributeError:
        raise ConversionError(
            f"module {name}: {type(model).__name__} has no such module", module=name
        ) from None
    if replaced not in (nn.Linear, nn.Embedding):
        # A class of its own may do more, as Gemma's embedding, which scales what it looks up.
        raise ConversionError(
            f"module {name}: a kernel cannot stand for {replaced.__name__}, which is no plain "
            "Linear or Embedding; ctconvert.runtime.load gives the modules by themselves",
            module=name,
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
