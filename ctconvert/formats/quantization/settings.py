"""The quantization_config of a checkpoint: which module has which scheme.

Beyond what a running model needs stand class names inferred without a model, the sparsity
configuration that newer compressed-tensors versions no longer read, and ``actorder: group``, which
they no longer accept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ctconvert.errors import BadInputError
from ctconvert.formats.patterns import PatternError, Patterns
from ctconvert.formats.quantization import handover, reading
from ctconvert.formats.quantization.config import OTHER_METHODS, copies_of_config, value_at
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
    format: str | None = None
    version: tuple[int, ...] | None = None
    ignore: Patterns = field(default_factory=Patterns)
    sparse_format: str | None = None
    sparse_targets: Patterns = field(default_factory=Patterns)
    sparse_ignore: Patterns = field(default_factory=Patterns)
    kv_cache: bool = False
    rotations: list[Rotation] = field(default_factory=list)
    _groups: dict[str, tuple[Scheme, str | None]] = field(default_factory=dict)
    _named: dict[str, list[str]] = field(default_factory=dict)
    _targets: Patterns = field(default_factory=Patterns)
    _known: dict[object, ModuleScheme] = field(default_factory=dict)

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
        paths = copies_of_config(config)
        if not paths:
            raise BadInputError(
                f"{where}: no quantization_config, so this is not a compressed-tensors "
                "checkpoint; quantise it first, for instance with llm-compressor",
                file=where,
            )
        raw = value_at(config, paths[0])
        if not isinstance(raw, dict):
            raise BadInputError(f"{where}: quantization_config is not an object", file=where)
        method = raw.get("quant_method")
        # 0.9 and older configs nest everything one level down and may omit quant_method
        if method is None and "config_groups" not in raw and "sparsity_config" not in raw:
            raise BadInputError(f"{where}: quantization_config names no quant_method", file=where)
        if method not in (None, "compressed-tensors", "sparseml"):
            known = OTHER_METHODS.get(method) if isinstance(method, str) else None
            raise BadInputError(
                f"{where}: quant_method is {shown(method)}, and ctconvert reads compressed-tensors "
                f"only; {known or 'use the tool that made it'}",
                file=where,
            )
        settings = cls(source=raw, where=where)
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
        for name, group in groups.items():
            self._parse_group(name, group)
        quantises = any(scheme.weights is not None for scheme, _ in self._groups.values())
        if self.kv_cache and not quantises and not self.sparse_format:
            raise BadInputError(
                f"{self.where}: only the KV cache is quantised (kv_cache_scheme), and no weight; "
                "there is nothing to convert, serve the checkpoint as it is",
                file=self.where,
            )
        if not groups and not self.sparse_format:
            raise BadInputError(
                f"{self.where}: quantization_config has neither config_groups nor a "
                "sparsity_config, so nothing says which modules are quantised",
                file=self.where,
            )
        # compressed-tensors' precedence: names, then patterns, both sorted, then class names
        ordered = sorted(self._named, key=lambda target: ("re:" in target, target))
        self._targets = self._patterns(ordered, "config_groups")
        self.rotations = self._rotations()

    def _bad(self, what: str, text: str) -> BadInputError:
        return BadInputError(f"{self.where}: quantization_config.{printable(what)}: {text}")

    def _object(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value or {}, dict):
            raise BadInputError(
                f"{self.where}: quantization_config.{printable(what)} is no object", file=self.where
            )
        return value or {}

    def _patterns(self, value: Any, what: str) -> Patterns:
        """A list of names and patterns."""
        if value is None:
            return Patterns()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            what = printable(what)
            raise BadInputError(
                f"{self.where}: quantization_config.{what} is not a list of names", file=self.where
            )
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
            raise BadInputError(
                f"{self.where}: quantization_config.{printable(what)} is no object", file=self.where
            )
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
        self._groups[name] = (scheme, stored)
        self._patterns(list(scheme.targets), f"{what}.targets")
        for target in dict.fromkeys(scheme.targets):
            self._named.setdefault(target, []).append(name)

    @property
    def targets(self) -> dict[str, list[str]]:
        """Every target of the config groups, and the groups that have it."""
        return self._named

    @property
    def groups(self) -> list[str]:
        """The config groups that quantise weights, by name."""
        return [name for name, (scheme, _) in self._groups.items() if scheme.weights is not None]

    @property
    def count(self) -> int:
        """How many schemes there are: config groups, and the one of sparse modules."""
        return len(self._groups) + (self.sparse_format is not None)

    def schemes_of(self, name: str, cls: str) -> list[ModuleScheme]:
        """The scheme of every config group that means module ``name``, were its class ``cls``.

        In compressed-tensors' own order (``match_targets``): exact names, then ``re:`` patterns,
        then class names; ``ignore`` takes any of the three.

        Raises:
            BadInputError: nothing names the format.
        """
        sparse = None
        if self.sparse_format is not None and not self.sparse_ignore.any(name, cls):
            sparse = self.sparse_targets.first(name, cls)
        found: dict[str, ModuleScheme] = {}
        targets = [item for item in (*self._targets.all(name), cls) if item in self._named]
        if targets and not self.ignore.any(name, cls):
            for target in targets:
                for group in reversed(self._named[target]):  # the last, where two have it
                    if group not in found:
                        found[group] = self._scheme(group, target, name, sparse is not None)
        if not found and sparse is not None:
            by = _how(sparse, name)
            return [ModuleScheme(str(self.sparse_format), None, sparse, sparse=True, by=by)]
        return list(found.values())

    def _scheme(self, group: str, target: str, name: str, sparse: bool) -> ModuleScheme:
        key = group, target, sparse, target == name
        if key not in self._known:
            scheme, stored = self._groups[group]
            if sparse:
                stored = self.sparse_format
            if stored is None:
                raise BadInputError(
                    f"{self.where}: module {name}: neither its config group nor the config names a "
                    "format, so nothing says how its tensors are stored",
                    file=self.where,
                )
            by = _how(target, name)
            self._known[key] = ModuleScheme(stored, scheme, target, sparse, group, by)
        return self._known[key]

    def names(self, name: str) -> bool:
        """Whether a config group names a module, and the ignore list does not."""
        return name in self._named and not self.ignore.any(name)

    def schemes_of_quantised(self, name: str) -> list[ModuleScheme]:
        """:meth:`schemes_of` for a module that holds quantised tensors: its class is only guessed.

        A name that does not say which may be the other class, but a table is never made of what is
        by its name a linear layer.
        """
        guess = guess_class(name)
        found = self.schemes_of(name, guess)
        if not found and guess == "Embedding":
            return self.schemes_of(name, "Linear")
        if not found and not looks_linear(name):
            return self.schemes_of(name, "Embedding")
        return found

    def schemes_of_groups(self, name: str) -> list[ModuleScheme]:
        """The scheme of every config group that quantises weights, whatever it targets."""
        sparse = self.sparse_format is not None and self.sparse_targets.any(name, guess_class(name))
        return [self._scheme(group, "", name, sparse) for group in self.groups]

    def _rotations(self) -> list[Rotation]:
        """Every transform (Hadamard or other) of transform_config that happens at run time.

        Those of the locations ``weight_input`` and ``weight_output`` are in the weights already.
        """
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
                where = apply.get("location")
                if where not in ("weight_input", "weight_output"):
                    text = f"{printable(what)} ({shown(where) if where else 'no location'})"
                    found.append(Rotation(text, targets, ignore))
        return found

    def rotation_elsewhere(self, quantised: Iterable[str], modules: Iterable[str]) -> str | None:
        """A rotation that means more than quantised modules, or nothing that is known.

        Args:
            quantised: names of the quantised modules.
            modules: names of all modules that hold tensors.
        """
        if not self.rotations:
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
        for rotation in self.rotations:
            for target in rotation.targets.entries:
                one = Rotation(rotation.what, Patterns([target]), rotation.ignore)
                elsewhere = any(one.means(name, None) for name in others)
                if elsewhere or not any(one.means(name, guess_class(name)) for name in known):
                    return f"{rotation.what}: {printable(target)}"
        return None

    def rotation_of(self, name: str, cls: str) -> str | None:
        """The rotation that touches the module at run time, None where there is none."""
        found = (rotation.what for rotation in self.rotations if rotation.means(name, cls))
        return next(found, None)


@dataclass(frozen=True)
class Rotation:
    """A transform of activations at run time: which, and the modules that it means."""

    what: str
    targets: Patterns
    ignore: Patterns

    def means(self, name: str, cls: str | None) -> bool:
        return self.targets.any(name, cls) and not self.ignore.any(name, cls)


def _how(target: str, name: str) -> Literal["name", "pattern", "class"]:
    if target == name:
        return "name"
    return "pattern" if target.startswith("re:") else "class"
