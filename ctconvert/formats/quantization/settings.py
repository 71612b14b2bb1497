"""The quantization_config of a checkpoint: which module has which scheme.

Beyond what a running model needs stand class names inferred without a model, the sparsity
configuration that newer compressed-tensors versions no longer read, and ``actorder: group``, which
they no longer accept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ctconvert.errors import BadInputError
from ctconvert.formats.patterns import PatternError, Patterns
from ctconvert.formats.quantization import handover, reading
from ctconvert.formats.quantization.config import CONFIG_PATHS, OTHER_METHODS, value_at
from ctconvert.formats.quantization.names import guess_class, looks_linear
from ctconvert.formats.quantization.reading import UnreadError, printable, shown
from ctconvert.formats.quantization.records import FORMAT_NAMES, ModuleScheme, Scheme

_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})*")


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
    ignore: Patterns = field(default_factory=Patterns)
    sparse_format: str | None = None
    sparse_targets: Patterns = field(default_factory=Patterns)
    sparse_ignore: Patterns = field(default_factory=Patterns)
    kv_cache: bool = False
    _schemes: dict[str, tuple[Scheme, str | None]] = field(default_factory=dict)
    _targets: Patterns = field(default_factory=Patterns)

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
        path = next((path for path in CONFIG_PATHS if value_at(config, path)), None)
        if path is None:
            raise BadInputError(
                f"{where}: no quantization_config, so this is not a compressed-tensors "
                "checkpoint; quantise it first, for instance with llm-compressor"
            )
        raw = value_at(config, path)
        if not isinstance(raw, dict):
            raise BadInputError(f"{where}: quantization_config is not an object")
        method = raw.get("quant_method")
        # 0.9 and older configs nest everything one level down and may omit quant_method
        if method is None and "config_groups" not in raw and "sparsity_config" not in raw:
            raise BadInputError(f"{where}: quantization_config names no quant_method")
        if method not in (None, "compressed-tensors", "sparseml"):
            known = OTHER_METHODS.get(method) if isinstance(method, str) else None
            raise BadInputError(
                f"{where}: quant_method is {shown(method)}, and ctconvert reads compressed-tensors "
                f"only; {known or 'use the tool that made it'}"
            )
        settings = cls(source=raw, where=where, path=path)
        settings._parse()
        return settings

    def _parse(self) -> None:
        raw = self.source
        self.format = raw.get("format")
        if self.format not in (None, "mixed-precision"):
            self.format = self._format(self.format, "format")
        if not isinstance(raw.get("version"), str | None):
            raise self._bad("version", f"is {shown(raw['version'])}, not a text")
        version = _VERSION.match(raw.get("version") or "")
        self.version = tuple(map(int, version.group().split("."))) if version else None
        self.ignore = self._patterns(raw.get("ignore"), "ignore")
        self.kv_cache = bool(raw.get("kv_cache_scheme"))
        sparsity = self._object(raw.get("sparsity_config"), "sparsity_config")
        if sparsity.get("format") not in (None, "dense"):
            self.sparse_format = self._format(sparsity["format"], "sparsity_config.format")
            self.sparse_targets = self._patterns(sparsity.get("targets"), "sparsity_config.targets")
            self.sparse_ignore = self._patterns(sparsity.get("ignore"), "sparsity_config.ignore")
        groups = self._object(raw.get("config_groups"), "config_groups")
        if not groups and not self.sparse_format:
            raise BadInputError(
                f"{self.where}: quantization_config has neither config_groups nor a "
                "sparsity_config, so nothing says which modules are quantised"
            )
        for name, group in groups.items():
            self._parse_group(name, group)
        # compressed-tensors' precedence: names, then patterns, both sorted, then class names
        ordered = sorted(self._schemes, key=lambda target: ("re:" in target, target))
        self._targets = self._patterns(ordered, "config_groups")

    def _bad(self, what: str, text: str) -> BadInputError:
        return BadInputError(f"{self.where}: quantization_config.{printable(what)}: {text}")

    def _object(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value or {}, dict):
            raise BadInputError(f"{self.where}: quantization_config.{printable(what)} is no object")
        return value or {}

    def _patterns(self, value: Any, what: str) -> Patterns:
        """A list of names and patterns."""
        if value is None:
            return Patterns()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            what = printable(what)
            raise BadInputError(f"{self.where}: quantization_config.{what} is not a list of names")
        try:
            reading.check_values(value)
            return Patterns(value)
        except (PatternError, UnreadError) as error:
            raise self._bad(what, printable(str(error))) from None

    def _format(self, value: Any, what: str) -> str:
        if isinstance(value, str) and (value in FORMAT_NAMES or value in handover.known_formats()):
            return value
        raise self._bad(
            what, f"unknown format {shown(value)}; the formats are {', '.join(FORMAT_NAMES)}"
        )

    def _parse_group(self, name: str, group: Any) -> None:
        what = f"config_groups.{name}"
        if not isinstance(group, dict | list):
            raise BadInputError(f"{self.where}: quantization_config.{printable(what)} is no object")
        try:
            reading.check_values(name)
            reading.check_values(group)
            try:
                scheme = reading.read_group(name, group)
            except UnreadError as unread:
                if isinstance(group, dict) and group.get("format") is not None:
                    self._format(group["format"], f"{what}.format")
                scheme = handover.read_group(name, group, unread)
        except UnreadError as error:
            raise self._bad(f"{what}.{error.path}".rstrip("."), error.text) from None
        # a group's own format wins; one written before groups had formats leaves it to the config
        stored = scheme.format
        if stored is None and self.format != "mixed-precision":
            stored = self.format
        for target in self._patterns(list(scheme.targets), f"{what}.targets").entries:
            self._schemes[target] = (scheme, stored)

    def _slow(self, error: PatternError) -> BadInputError:
        return BadInputError(f"{self.where}: quantization_config: {error}")

    def scheme_of(self, name: str, cls: str) -> ModuleScheme | None:
        """The scheme of module ``name``, were its class ``cls``; None where it has none.

        The first that matches, in compressed-tensors' own order (``match_targets``): exact
        names, then ``re:`` patterns, then class names; ``ignore`` takes any of the three.

        Raises:
            BadInputError: a pattern takes too long, or nothing names the format.
        """
        try:
            return self._scheme_of(name, cls)
        except PatternError as error:
            raise self._slow(error) from None

    def _scheme_of(self, name: str, cls: str) -> ModuleScheme | None:
        sparse = None
        if self.sparse_format is not None and not self.sparse_ignore.any(name, cls):
            sparse = self.sparse_targets.first(name, cls)
        target = None
        if not self.ignore.any(name, cls):
            target = self._targets.first(name) or (cls if cls in self._schemes else None)
        if target is None:
            if sparse is None:
                return None
            return ModuleScheme(str(self.sparse_format), None, sparse, sparse=True)
        scheme, stored = self._schemes[target]
        if sparse is not None:
            stored = self.sparse_format
        if stored is None:
            raise BadInputError(
                f"{self.where}: module {name}: neither its config group nor the config names a "
                "format, so nothing says how its tensors are stored"
            )
        return ModuleScheme(stored, scheme, target, sparse is not None)

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
    def transform_targets(self) -> list[tuple[Patterns, Patterns]]:
        """(targets, ignore) of every transform (Hadamard or other rotation) in transform_config."""
        config = self._object(self.source.get("transform_config"), "transform_config")
        groups = self._object(config.get("config_groups"), "transform_config.config_groups")
        found = []
        for name, group in groups.items():
            what = f"transform_config.config_groups.{name}"
            applied = self._object(group, what).get("apply") or []
            if not isinstance(applied, list):
                raise self._bad(f"{what}.apply", "is no list")
            for entry in applied:
                apply = self._object(entry, f"{what}.apply")
                targets = self._patterns(apply.get("targets"), f"{what}.targets")
                ignore = self._patterns(apply.get("ignore"), f"{what}.ignore")
                found.append((targets, ignore))
        return found

    def transforms_elsewhere(self, quantised: Iterable[str], modules: Iterable[str]) -> str | None:
        """A transform target that means more than quantised modules, or nothing that is known.

        Args:
            quantised: names of the quantised modules.
            modules: names of all modules that hold tensors.

        Raises:
            BadInputError: the transform_config cannot be read, or a pattern takes too long.
        """
        if not self.transform_targets:
            return None
        known = dict.fromkeys(quantised)
        others = {name for name in modules if name not in known}
        for name in [*known, *others]:  # attention modules, layers: they hold no tensors themselves
            while name := name.rpartition(".")[0]:
                if name in others:
                    break  # and so are its parents
                others.add(name)
            else:
                others.add("")
        others -= known.keys()
        try:
            for targets, ignore in self.transform_targets:
                for target in targets.entries:
                    one = Patterns([target])
                    elsewhere = (
                        one.any(name, None) and not ignore.any(name, None) for name in others
                    )
                    here = (
                        one.any(name, guess_class(name)) and not ignore.any(name, guess_class(name))
                        for name in known
                    )
                    if any(elsewhere) or not any(here):
                        return target
        except PatternError as error:
            raise self._slow(error) from None
        return None

    def transformed(self, name: str, cls: str) -> bool:
        """Whether a transform_config entry touches the module.

        Raises:
            BadInputError: the transform_config cannot be read, or a pattern takes too long.
        """
        try:
            return any(
                targets.any(name, cls) and not ignore.any(name, cls)
                for targets, ignore in self.transform_targets
            )
        except PatternError as error:
            raise self._slow(error) from None
