"""The quantization_config of a checkpoint: which module has which scheme.

The models are compressed-tensors' own (``QuantizationScheme``, ``QuantizationArgs``); this file
adds what a converter needs and a running model does not: class names inferred without a model,
the sparsity configuration that newer compressed-tensors versions no longer read, and
``actorder: group``, which they no longer accept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ctconvert.errors import BadInputError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

#: quant_method values other than ours, and who handles them.
OTHER_METHODS: Mapping[str, str] = {
    "gptq": "serve it with vLLM's or SGLang's GPTQ loader, or GPTQModel",
    "awq": "convert it first with compressed-tensors' AutoAWQ converter (compressed_tensors."
    "entrypoints.convert)",
    "bitsandbytes": "load it with transformers and bitsandbytes",
    "fp8": "convert it first with compressed-tensors' convert_checkpoint, or serve it with vLLM",
    "mxfp4": "load it with transformers or vLLM, which read it directly",
    "modelopt": "convert it first with compressed-tensors' ModelOpt NVFP4 converter",
    "quark": "load it with AMD Quark or vLLM",
    "torchao": "load it with torchao",
    "hqq": "load it with hqq",
    "auto-round": "export it again from auto-round with format llm_compressor",
    "ctconvert": "it is already kernel-ready: check it with `ctconvert verify`",
}

_EMBEDDING_LEAVES = re.compile(
    r"(^|.*_)(embed_tokens|embeddings?|wte|wpe|embed_positions|pos_embed|embed_in|tok_embeddings)"
    r"(_per_layer)?$"
)
_LINEAR_LEAVES = re.compile(
    r"(.*_)?(proj|fc|linear|dense|qkv|query|key|value|w|mlp|head|c_attn|embed_tokens|wte)_?\d*$"
)
_ROUTER_LEAVES = frozenset(
    {"gate", "router", "wg", "gating", "shared_expert_gate", "classifier", "router_layer"}
)


@dataclass(frozen=True)
class ModuleScheme:
    """The scheme of one module.

    ``format`` is the compressed-tensors format its tensors are stored in, ``scheme`` the
    compressed-tensors ``QuantizationScheme`` (None for a sparse-only module), ``actorder_group``
    whether the columns carry a ``weight_g_idx``.
    """

    format: str
    scheme: QuantizationScheme | None
    target: str
    actorder_group: bool = False
    sparse: bool = False


#: Where a config.json may hold the quantisation: multimodal models nest it.
CONFIG_PATHS = (
    ("quantization_config",),
    ("compression_config",),
    ("text_config", "quantization_config"),
    ("text_config", "compression_config"),
)


def _at(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def with_config(config: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of a config.json with the quantisation at ``path`` replaced."""
    key, *rest = path
    inner = with_config(config[key], rest, value) if rest else value
    return {name: inner if name == key else old for name, old in config.items()}


def config_of_method(config: Mapping[str, Any], method: str) -> tuple[tuple[str, ...], Any] | None:
    """Where a config.json holds a quantisation of ``method``, and what it is."""
    for path in CONFIG_PATHS:
        found = _at(config, path)
        if isinstance(found, dict) and found.get("quant_method") == method:
            return path, found
    return None


def guess_class(module: str) -> str:
    """``Embedding`` or ``Linear``: a checkpoint does not hold class names, so names decide."""
    return "Embedding" if _EMBEDDING_LEAVES.match(module.rpartition(".")[2]) else "Linear"


def is_router(module: str) -> bool:
    """Whether a dense 2-D weight of this name may be an MoE router, which is no ``Linear``."""
    return module.rpartition(".")[2] in _ROUTER_LEAVES


def looks_linear(module: str) -> bool:
    """Whether a module is by its name a linear layer or a token embedding."""
    return _LINEAR_LEAVES.match(module.rpartition(".")[2]) is not None


def _match(target: str, name: str, cls: str | None) -> bool:
    """compressed-tensors' rule: ``re:`` patterns match from the start, names and classes whole."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, cls)


def _any_match(targets: Sequence[str], name: str, cls: str | None) -> bool:
    return any(_match(target, name, cls) for target in targets)


@dataclass
class QuantizationSettings:
    """A parsed quantization_config.

    ``source`` is the original dictionary, unchanged. Raises :class:`BadInputError` where it is
    not one that can be read.
    """

    source: dict[str, Any]
    where: str
    path: tuple[str, ...] = ("quantization_config",)
    format: str | None = None
    version: tuple[int, ...] | None = None
    ignore: list[str] = field(default_factory=list)
    sparse_format: str | None = None
    sparse_targets: list[str] = field(default_factory=list)
    sparse_ignore: list[str] = field(default_factory=list)
    kv_cache: bool = False
    _targets: dict[str, tuple[QuantizationScheme, str | None, bool]] = field(default_factory=dict)

    @classmethod
    def parse(cls, config: Mapping[str, Any], where: str) -> QuantizationSettings:
        """Reads ``quantization_config`` (or the older ``compression_config``) of a config.json.

        Args:
            config: the parsed config.json.
            where: its path, for messages.

        Raises:
            BadInputError: no quantization_config, another quant_method, an unknown format or
                a scheme that compressed-tensors does not accept.
        """
        path = next((path for path in CONFIG_PATHS if _at(config, path)), None)
        raw = None if path is None else _at(config, path)
        if path is None or raw is None:
            raise BadInputError(
                f"{where}: no quantization_config, so this is not a compressed-tensors "
                "checkpoint; quantise it first, for instance with llm-compressor"
            )
        if not isinstance(raw, dict):
            raise BadInputError(f"{where}: quantization_config is not an object")
        method = raw.get("quant_method")
        # 0.9 and older configs nest everything one level down and may omit quant_method
        if method is None and "config_groups" not in raw and "sparsity_config" not in raw:
            raise BadInputError(f"{where}: quantization_config names no quant_method")
        if method not in (None, "compressed-tensors", "sparseml"):
            hint = OTHER_METHODS.get(str(method), "use the tool that made it")
            raise BadInputError(
                f"{where}: quant_method is {method!r}, and ctconvert reads compressed-tensors "
                f"only; {hint}"
            )
        settings = cls(source=raw, where=where, path=path)
        settings._parse()
        return settings

    def _parse(self) -> None:
        raw = self.source
        self.format = raw.get("format")
        if self.format not in (None, "mixed-precision"):
            self.format = self._format(self.format, "format")
        version = re.match(r"\d+(\.\d+)*", str(raw.get("version") or ""))
        self.version = tuple(map(int, version.group().split("."))) if version else None
        self.ignore = self._strings(raw.get("ignore"), "ignore")
        self.kv_cache = bool(raw.get("kv_cache_scheme"))
        sparsity = raw.get("sparsity_config") or {}
        if not isinstance(sparsity, dict):
            raise BadInputError(f"{self.where}: quantization_config.sparsity_config is no object")
        if sparsity.get("format") not in (None, "dense"):
            self.sparse_format = self._format(sparsity["format"], "sparsity_config.format")
            self.sparse_targets = self._strings(sparsity.get("targets"), "sparsity_config.targets")
            self.sparse_ignore = self._strings(sparsity.get("ignore"), "sparsity_config.ignore")
        groups = raw.get("config_groups") or {}
        if not isinstance(groups, dict):
            raise BadInputError(f"{self.where}: quantization_config.config_groups is no object")
        if not groups and not self.sparse_format:
            raise BadInputError(
                f"{self.where}: quantization_config has neither config_groups nor a "
                "sparsity_config, so nothing says which modules are quantised"
            )
        for name, group in groups.items():
            self._parse_group(name, group)

    def _object(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value or {}, dict):
            raise BadInputError(f"{self.where}: quantization_config.{what} is no object")
        return value or {}

    def _strings(self, value: Any, what: str) -> list[str]:
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadInputError(f"{self.where}: quantization_config.{what} is not a list of names")
        for item in value:
            if item.startswith("re:"):
                try:
                    re.compile(item[3:])
                except re.error as error:
                    raise BadInputError(
                        f"{self.where}: quantization_config.{what}: {item!r} is not a regular "
                        f"expression ({error})"
                    ) from None
        return value

    def _format(self, value: Any, what: str) -> str:
        from compressed_tensors.config import CompressionFormat

        known = sorted(item.value for item in CompressionFormat)
        if value not in known:
            raise BadInputError(
                f"{self.where}: quantization_config.{what}: unknown format {value!r}; the formats "
                f"are {', '.join(known)}"
            )
        return str(value)

    def _parse_group(self, name: str, group: Any) -> None:
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
        from pydantic import ValidationError

        what = f"config_groups.{name}"
        actorder_group = False
        try:
            if isinstance(group, list):
                scheme = preset_name_to_scheme(name, self._strings(group, what))
            else:
                if not isinstance(group, dict):
                    raise BadInputError(f"{self.where}: quantization_config.{what} is no object")
                group = copy.deepcopy(group)
                weights = group.get("weights")
                if isinstance(weights, dict):
                    order = weights.get("actorder")
                    actorder_group = order is True or str(order).lower() in ("group", "dynamic")
                    if actorder_group:  # a checkpoint may hold what newer versions cannot make
                        weights["actorder"] = None
                stored = group.get("format")
                if stored is not None:
                    self._format(stored, f"{what}.format")
                scheme = QuantizationScheme.model_validate(group)
        except KeyError as error:
            raise BadInputError(f"{self.where}: quantization_config.{what}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join([what, *map(str, first["loc"])])
            raise BadInputError(
                f"{self.where}: quantization_config.{path}: {first['msg']} (as compressed-tensors "
                "reads it; a newer compressed-tensors may know the field)"
            ) from None
        except NotImplementedError as error:
            raise BadInputError(f"{self.where}: quantization_config.{what}: {error}") from None
        except (TypeError, AttributeError) as error:  # its validators take types on trust
            raise BadInputError(
                f"{self.where}: quantization_config.{what}: a value has a wrong type ({error})"
            ) from None
        stored = getattr(scheme.format, "value", scheme.format)
        # a group's own format wins; one written before groups had formats leaves it to the config
        if stored is None and self.format != "mixed-precision":
            stored = self.format
        for target in self._strings(list(scheme.targets), f"{what}.targets"):
            self._targets[target] = (scheme, stored, actorder_group)

    @cached_property
    def _ordered(self) -> list[str]:
        # compressed-tensors' precedence: names, then patterns, both sorted, then class names
        return sorted(self._targets, key=lambda target: ("re:" in target, target))

    def _quantised(self, name: str, cls: str) -> str | None:
        if _any_match(self.ignore, name, cls):
            return None
        by_name = [target for target in self._ordered if _match(target, name, None)]
        by_class = [target for target in self._ordered if target == cls]
        return next(iter([*by_name, *by_class]), None)

    def scheme_of(self, name: str, cls: str) -> ModuleScheme | None:
        """The scheme of module ``name``, were its class ``cls``; None where it has none.

        The first that matches, in compressed-tensors' own order (``match_targets``): exact
        names, then ``re:`` patterns, then class names; ``ignore`` takes any of the three.
        """
        sparse = (
            self.sparse_format is not None
            and _any_match(self.sparse_targets, name, cls)
            and not _any_match(self.sparse_ignore, name, cls)
        )
        target = self._quantised(name, cls)
        if target is None:
            if not sparse:
                return None
            hit = next(t for t in self.sparse_targets if _match(t, name, cls))
            return ModuleScheme(str(self.sparse_format), None, hit, sparse=True)
        scheme, stored, actorder_group = self._targets[target]
        if sparse:
            stored = self.sparse_format
        if stored is None:
            raise BadInputError(
                f"{self.where}: module {name}: neither its config group nor the config names a "
                "format, so nothing says how its tensors are stored"
            )
        return ModuleScheme(stored, scheme, target, actorder_group, sparse)

    def scheme_of_quantised(self, name: str) -> ModuleScheme | None:
        """:meth:`scheme_of` for a module that holds quantised tensors: its class is only guessed.

        A name that does not say which may be the other class, but a table is never made of what is
        by its name a linear layer.
        """
        guess = guess_class(name)
        found = self.scheme_of(name, guess)
        if found is None and guess == "Embedding":
            return self.scheme_of(name, "Linear")
        if found is None and not looks_linear(name):
            return self.scheme_of(name, "Embedding")
        return found

    @cached_property
    def transform_targets(self) -> list[tuple[list[str], list[str]]]:
        """(targets, ignore) of every transform (Hadamard or other rotation) in transform_config."""
        config = self._object(self.source.get("transform_config"), "transform_config")
        groups = self._object(config.get("config_groups"), "transform_config.config_groups")
        found = []
        for name, group in groups.items():
            what = f"transform_config.config_groups.{name}"
            applied = self._object(group, what).get("apply") or []
            if not isinstance(applied, list):
                raise BadInputError(f"{self.where}: quantization_config.{what}.apply is no list")
            for entry in applied:
                apply = self._object(entry, f"{what}.apply")
                found.append(
                    (
                        self._strings(apply.get("targets"), f"{what}.targets"),
                        self._strings(apply.get("ignore"), f"{what}.ignore"),
                    )
                )
        return found

    def transforms_elsewhere(self, quantised: Iterable[str], modules: Iterable[str]) -> str | None:
        """A transform target that means more than quantised modules, or nothing that is known.

        Args:
            quantised: names of the quantised modules.
            modules: names of all modules that hold tensors.
        """
        known = set(quantised)
        others = {name for name in modules if name not in known}
        for name in [*known, *others]:  # attention modules, layers: they hold no tensors themselves
            while name:
                name = name.rpartition(".")[0]
                others.add(name)
        others -= known
        for targets, ignore in self.transform_targets:
            for target in targets:

                def hit(name: str, target: str = target, ignore: list[str] = ignore) -> bool:
                    cls = guess_class(name) if name in known else None
                    return _match(target, name, cls) and not _any_match(ignore, name, cls)

                if any(map(hit, others)) or not any(map(hit, known)):
                    return target
        return None

    def transformed(self, name: str, cls: str) -> bool:
        """Whether a transform_config entry touches the module."""
        return any(
            _any_match(targets, name, cls) and not _any_match(ignore, name, cls)
            for targets, ignore in self.transform_targets
        )


def family(module: ModuleScheme, stored: str, embedding: bool) -> str:
    """The scheme family of a module, first that fits.

    One of ``sparse24``, ``mxfp4``, ``nvfp4``, ``wna8o8`` (INT weights with static INT8
    activations), ``w8a8``, ``w4a8``, ``wna16``, ``embedding`` or ``other``.

    Args:
        module: the module's scheme.
        stored: the format its tensors are stored in.
        embedding: whether the module is a lookup table.
    """
    if module.sparse:
        return "sparse24"
    scheme = module.scheme
    if scheme is None or scheme.weights is None:
        return "other"
    weights, inputs, outputs = scheme.weights, scheme.input_activations, scheme.output_activations
    if embedding:
        return "embedding" if weights.type == "int" else "other"
    if weights.type == "float" and weights.num_bits == 4:
        if weights.strategy == "tensor_group":
            return "nvfp4"
        return "mxfp4" if weights.group_size == 32 else "other"

    def static_int8(args: Any) -> bool:
        return (
            args is not None
            and args.type == "int"
            and args.num_bits == 8
            and not args.dynamic
            and args.strategy == "tensor"
        )

    is_int = weights.type == "int"
    packable = stored in ("pack-quantized", "int-quantized", "naive-quantized")
    if is_int and packable and weights.strategy in ("channel", "group"):
        if static_int8(outputs):
            return "wna8o8"
        if static_int8(inputs) and weights.num_bits < 8:
            return "wna8o8"
    if weights.num_bits == 8 and outputs is None:
        same = inputs is None or (
            inputs.type == weights.type and inputs.num_bits == 8 and _w8a8_inputs(weights, inputs)
        )
        if weights.type == "float" and weights.strategy in ("tensor", "channel", "block") and same:
            return "w8a8"
        if is_int and inputs is not None and same:
            return "w8a8"
    if is_int and inputs is not None and inputs.type == "int" and outputs is None:
        dynamic_token = bool(inputs.dynamic) and inputs.strategy == "token"
        if weights.num_bits == 4 and inputs.num_bits == 8 and dynamic_token:
            return "w4a8"
    if is_int and inputs is None and outputs is None:
        return "wna16"
    return "other"


def _w8a8_inputs(weights: QuantizationArgs, inputs: QuantizationArgs) -> bool:
    """Static per tensor or dynamic per token; in groups of 128 only beside block-wise weights."""
    if not inputs.dynamic:
        return bool(inputs.strategy == "tensor")
    if weights.strategy == "block":
        return bool(inputs.strategy == "group" and inputs.group_size == 128)
    return bool(inputs.strategy == "token")


def activations_label(scheme: QuantizationScheme | None) -> str | None:
    """For people and the manifest: ``int8 dynamic token in``, or None for weight-only."""
    if scheme is None:
        return None
    labels = []
    for args, end in ((scheme.input_activations, "in"), (scheme.output_activations, "out")):
        if args is not None:
            kind = "fp" if args.type == "float" else "int"
            when = "dynamic" if args.dynamic else "static"
            asym = "" if args.symmetric else "asym "
            labels.append(f"{kind}{args.num_bits} {asym}{when} {args.strategy} {end}")
    return ", ".join(labels) or None
