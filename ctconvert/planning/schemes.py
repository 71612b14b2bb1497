"""Which modules are quantised and by which config group: the tensors say whether, the config how.

A config is written of the model in memory and a checkpoint holds names alone, so a class target
may mean a weight that never was quantised, and a wrapper's prefix can make a target miss. Where
more than one group could be meant, or none is, the group whose format fits a module's tensors
exactly decides; where that leaves a choice it is a fault of the module, which names the candidates.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from msgspec.structs import replace

from ctconvert import formats
from ctconvert.errors import BadInputError
from ctconvert.formats.quantization import (
    ModuleScheme,
    QuantizationSettings,
    guess_class,
)
from ctconvert.formats.quantization.names import other_names
from ctconvert.planning.modules import Entries, Module, Reader

#: Tensors that show a module's weight is quantised, whatever the config says.
_EVIDENCE = frozenset(
    {
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
        "compressed",
        "bitmask",
    }
)
_QUANTISED_DTYPES = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2"})


def evidence(entries: Entries) -> list[str]:
    """What shows that a module's weight is quantised."""
    found = sorted(_EVIDENCE & entries.keys())
    weight = entries.get("weight")
    if weight is not None and weight.spec.dtype in _QUANTISED_DTYPES:
        found.append(f"weight {weight.spec}")
    return found


class Matcher:
    """Gives every module of one checkpoint its scheme, and remembers what was odd.

    Args:
        settings: the checkpoint's.
        reader: checks tensors against schemes.
        names: of all its modules.
    """

    def __init__(
        self, settings: QuantizationSettings, reader: Reader, names: Container[str]
    ) -> None:
        self.settings = settings
        self.reader = reader
        self._names = names
        self._used: set[str] = set()
        self._renamed: list[tuple[str, str]] = []
        self._by_fit: list[tuple[str, str]] = []
        self._dense: dict[str, list[str]] = {}
        self._named_otherwise: list[str] = []

    def quantised(self, name: str, entries: Entries) -> Module:
        """A module that holds quantised tensors."""
        found = self.settings.schemes_of_quantised(name)
        if len(found) == 1:
            self._used.add(found[0].group)
            return self.reader.module(name, found[0], entries)
        if found:
            return self._among(name, found, entries)
        cls = guess_class(name)
        if self.settings.ignore.any(name, cls):
            return self._fault(name, entries, "and the ignore list of config.json names it")
        return self._unnamed(name, entries)

    def _among(self, name: str, found: Sequence[ModuleScheme], entries: Entries) -> Module:
        """Several groups mean the module: the one whose format fits."""
        fitting = [scheme for scheme in found if self.reader.fits(name, scheme, entries)]
        nearest = [scheme for scheme in fitting if scheme.by == fitting[0].by]
        if len(nearest) == 1 or (nearest and _alike(nearest)):
            self._used.add(nearest[0].group)
            return self.reader.module(name, nearest[0], entries)
        self._used.update(scheme.group for scheme in found)
        if not fitting and len([scheme for scheme in found if scheme.by == found[0].by]) == 1:
            return self.reader.module(name, found[0], entries)
        if not fitting and any(formats.get(scheme.format) is None for scheme in found):
            return self.reader.module(name, found[0], entries)
        groups = " and ".join(f"{scheme.group} (target {scheme.target!r})" for scheme in found)
        how = f"{'more than one' if fitting else 'none'} of them fits its tensors"
        return self._fault(name, entries, f"config groups {groups} both mean it, and {how}")

    def _unnamed(self, name: str, entries: Entries) -> Module:
        """No group means the module under its name: another name of it, or the group that fits."""
        candidates: dict[str, tuple[ModuleScheme, str]] = {}
        for other in other_names(name):
            if len(candidates) == self.settings.count:
                break  # every group has one
            for scheme in self.settings.schemes_of(other, guess_class(other)):
                candidates.setdefault(scheme.group, (scheme, other))
        fitting = [pair for pair in candidates.values() if self.reader.fits(name, pair[0], entries)]
        if len(fitting) == 1:
            scheme, other = fitting[0]
            self._renamed.append((name, other))
        else:
            schemes = [pair[0] for pair in fitting] or [
                scheme
                for scheme in self.settings.schemes_of_groups(name)
                if self.reader.fits(name, scheme, entries)
            ]
            if not schemes:
                return self._fault(
                    name,
                    entries,
                    "but no target of the quantization_config in config.json means "
                    "it, and no config group fits them",
                )
            if len(schemes) > 1 and not _alike(schemes):
                groups = ", ".join(scheme.group for scheme in schemes)
                return self._fault(
                    name,
                    entries,
                    "but no target of the quantization_config in config.json means "
                    f"it, and more than one config group fits them: {groups}",
                )
            scheme = schemes[0]
            self._by_fit.append((name, scheme.group))
        self._used.add(scheme.group)
        return self.reader.module(name, scheme, entries)

    def _fault(self, name: str, entries: Entries, text: str) -> Module:
        what = f"holds {', '.join(evidence(entries))}, {text}"
        found = Module(name, "unknown", "unknown", entries, fault=True)
        found.reason = f"{what}; the config and the tensors contradict each other"
        return found

    def dense(self, name: str, entries: Entries) -> Module | None:
        """A module that holds no quantised tensor: one with a fault where the config names it."""
        weight = entries.get("weight")
        if weight is None or len(weight.spec.shape) != 2:
            return None
        others = (other for other in other_names(name) if other not in self._names)
        if any(self.settings.names(other) for other in others):
            self._named_otherwise.append(name)
        for scheme in self.settings.schemes_of(name, guess_class(name)):
            if scheme.scheme is not None and scheme.scheme.weights is None:
                continue
            if scheme.by == "name":
                return Module(
                    name,
                    scheme.format,
                    weight.spec.dtype.lower(),
                    entries,
                    reason=f"the config says {scheme.format} of this very name "
                    f"({scheme.group}), but its weight is dense, {weight.spec}; list it in "
                    "quantization_config.ignore if it is meant to be unquantised",
                    fault=True,
                )
            # by its class or a pattern: it may be of another class, which no checkpoint says
            self._dense.setdefault(scheme.group, []).append(name)
        return None

    def check_groups(self) -> None:
        """Raises BadInputError for a config group of which not one module is quantised."""
        for group, names in self._dense.items():
            if group not in self._used:
                raise BadInputError(
                    f"{self.settings.where}: {group} means {_counted(names, 'module')}, and not "
                    "one of them is quantised; the config and the tensors contradict each other"
                )

    def notes(self) -> Iterator[str]:
        """What was decided without the config's very word, a line each."""
        dense = list(dict.fromkeys(name for names in self._dense.values() for name in names))
        if dense:
            verb = "is" if len(dense) == 1 else "are"
            yield (
                f"{_counted(dense, 'module')} that the config means by class or pattern {verb} "
                "unquantised, and copied"
            )
        if self._named_otherwise:
            yield (
                f"{_counted(self._named_otherwise, 'module')} that the config names, under another "
                "prefix, unquantised and copied"
            )
        if self._renamed:
            name, other = self._renamed[0]
            yield (
                f"{_counted([name for name, _ in self._renamed], 'quantised module')} matched "
                f"under another prefix ({name} as {other})"
            )
        if self._by_fit:
            groups = ", ".join(dict.fromkeys(group for _, group in self._by_fit))
            yield (
                f"{_counted([name for name, _ in self._by_fit], 'quantised module')} that no "
                f"target means matched by the only config group that fits ({groups})"
            )


def _alike(schemes: Sequence[ModuleScheme]) -> bool:
    """Whether schemes mean the same, whatever they target."""
    plain = [
        (item.format, item.scheme and replace(item.scheme, targets=(), format=None))
        for item in schemes
    ]
    return all(item == plain[0] for item in plain)


def _counted(names: Sequence[str], what: str) -> str:
    """``3 modules (a, b, c)``, the first few named."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' * (len(names) != 1)} ({shown})"
