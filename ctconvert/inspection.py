"""``inspect``: a description (and a plan for a target) as data."""

from __future__ import annotations

from typing import Any

from ctconvert.description import Description, Module, total_bytes
from ctconvert.planning import Plan


def _module_json(module: Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": module.name,
        "format": module.format,
        "weights": module.label,
        "bytes": module.nbytes,
        "tensors": {
            local: {"dtype": entry.spec.dtype, "shape": list(entry.spec.shape), "file": entry.file}
            for local, entry in module.entries.items()
        },
    }
    if module.experts:
        spec = module.experts[0].spec
        found |= {
            "scheme": spec.family,
            "shape": [spec.n, spec.k],
            "experts": len(module.experts) if module.stacked_experts else None,
        }
    if module.reason:
        found["unsupported"] = module.reason
    return found


def inspection(description: Description, plan: Plan | None) -> dict[str, Any]:
    """The content of ``ctconvert inspect --json``."""
    source, settings = description.source, description.settings
    quantised = [_module_json(module) for module in description.modules.values()]
    if plan is not None:
        layouts = {part.module: item.layout.name for item in plan.modules for part in item.parts}
        refusals = {refusal.module: refusal.reason for refusal in plan.kept}
        for module in quantised:
            module["layout"] = layouts.get(module["name"])
            if module["name"] in refusals:
                module["refused"] = refusals[module["name"]]
    version = ".".join(map(str, settings.version)) if settings.version else None
    return {
        "model": source.files.where,
        "revision": source.files.revision,
        "architectures": source.config.get("architectures"),
        "format": settings.format or settings.sparse_format,
        "compressed_tensors_version": version,
        "shards": [{"name": name, "bytes": source.sizes[name]} for name in source.shards],
        "bytes": total_bytes(source.tensors.values()),
        "quantised_bytes": sum(module.nbytes for module in description.modules.values()),
        "tensors": len(source.tensors),
        "unquantised_tensors": len(description.plain),
        "modules": quantised,
        "target": None if plan is None else plan.options.target,
        "oddities": description.oddities,
    }
