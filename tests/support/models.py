"""Small models written without compressed-tensors, and what is done with them.

Everything here is quick enough to be done a thousand times in a test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ctconvert.output import Output
from ctconvert.planning.describe import describe
from ctconvert.planning.make import make_plan, restore_plan
from ctconvert.progress import Progress, Silent
from ctconvert.records import Options, Plan, Report
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.local import LocalStore
from ctconvert.work.build import Settings, build
from ctconvert.work.executors import Executor

from .executors import Inline

#: int4 with a scale for every 32 columns, for Linear modules.
INT4: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    },
    "format": "pack-quantized",
}
N, K, GROUP = 64, 128, 32
#: The shards of :func:`write_model`'s output where :func:`options` says nothing else.
SHARDS = 3


def config(**more: Any) -> dict[str, Any]:
    """A config.json whose quantization_config is of :data:`INT4`."""
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": INT4},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization, **more}


def module_name(index: int) -> str:
    return f"model.layers.{index}.mlp.up_proj"


def int4_module(name: str, made: torch.Generator, n: int = N, k: int = K) -> dict[str, Any]:
    """The tensors of an int4 module: random codes, random scales."""
    codes = torch.randint(-(1 << 31), 1 << 31, (n, k // 8), generator=made)
    return {
        f"{name}.weight_packed": codes.to(torch.int32),
        f"{name}.weight_scale": (torch.rand(n, k // GROUP, generator=made) + 0.5).bfloat16(),
        f"{name}.weight_shape": torch.tensor([n, k]),
    }


def write_model(folder: Path, seed: int = 1, modules: int = 6) -> Path:
    """60 kB: int4 modules and plain tensors in two shards, and a few side files."""
    made = torch.Generator().manual_seed(seed)
    first: dict[str, torch.Tensor] = {"model.norm.weight": torch.randn(K, generator=made)}
    for index in range(modules):
        first |= int4_module(module_name(index), made)
    second = {"lm_head.weight": torch.randn(64, 64, generator=made)}
    folder.mkdir(parents=True)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file(first, folder / names[0], metadata={"format": "pt"})
    save_file(second, folder / names[1], metadata={"format": "pt"})
    weight_map = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config())
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ messages }}")
    return folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value))


def tree(folder: Path) -> dict[str, str] | None:
    """The hash of every file; None where there is no such folder."""
    if not folder.is_dir():
        return None
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def options(**more: Any) -> Options:
    """Three shards: two of three modules, and one of the last module and the plain tensors."""
    return Options(**({"target": "triton", "max_shard_size": 15_000} | more))


def plan_of(store: Store, asked: Options | None = None) -> Plan:
    return make_plan(describe(Checkpoint(store)), asked or options())


def repack(
    model: Path | Store,
    out: Path,
    *,
    asked: Options | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """A conversion, in this thread where no executor is given."""
    store = model if isinstance(model, Store) else LocalStore(model)
    chosen = Settings(executor or Inline(), progress or Silent(), **settings)
    return build(plan_of(store, asked), store, out, chosen)


def restore(
    out: Path,
    dest: Path,
    *,
    max_shard_size: int = 15_000,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """The way back, in this thread where no executor is given."""
    output = Output.open(out)
    chosen = Settings(executor or Inline(), progress or Silent(), **settings)
    plan = restore_plan(output.manifest, output.store.id, max_shard_size)
    return build(plan, output.store, dest, chosen)
