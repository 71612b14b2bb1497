"""What must not be served is refused by name, and what is served is served as it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.builders import group_config, weight_args

import ctconvert
from ctconvert.errors import VerificationError
from ctconvert.records import Convert, Manifest
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.local import LocalStore

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from integration.checkpoints import QWEN3_MOE, write_pair
from integration.engine import serve

VICTIM = "model.layers.1.self_attn.k_proj.qweight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.scales"
GROUP = group_config(weight_args(4, 64))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    source, _ = write_pair(tmp_path, GROUP)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    return tmp_path / "out"


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    source, _ = write_pair(tmp_path, GROUP, QWEN3_MOE)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    return tmp_path / "out"


Change = Callable[[torch.Tensor], torch.Tensor]


def edit_header(out: Path, old: str, new: str) -> None:
    """Changes the text of the header, which stays as long, and nothing in the manifest."""
    path = out / "model.safetensors"
    data = path.read_bytes()
    assert len(old) == len(new) and data.count(old.encode()) == 1
    path.write_bytes(data.replace(old.encode(), new.encode()))


def test_a_renamed_tensor(out: Path) -> None:
    edit_header(out, VICTIM, VICTIM.replace("k_proj", "x_proj"))
    with pytest.raises(VerificationError, match=f"lacks tensor {VICTIM}"):
        serve(out)


def test_a_tensor_of_another_shape(out: Path) -> None:
    start = f'"{VICTIM}":{{"dtype":"I32","shape":'
    edit_header(out, f"{start}[256,16]", f"{start}[16,256]")
    with pytest.raises(VerificationError, match=f"{VICTIM} is "):
        serve(out)


def test_a_truncated_file(out: Path) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match=r"model\.safetensors: .* bytes, expected"):
        serve(out)


def test_a_flipped_bit(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTCONVERT_VERIFY", "1")
    serve(out)
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[Manifest.load(LocalStore(out)).plan.entries[VICTIM].offset + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=f"{VICTIM}: damaged"):
        serve(out)


def test_a_layout_of_another_version(out: Path) -> None:
    manifest = Manifest.load(LocalStore(out))
    items = [
        replace(item, recipe=replace(item.recipe, layout_version=99))
        if isinstance(item, Convert)
        else item
        for item in manifest.plan.items
    ]
    changed = replace(manifest, plan=replace(manifest.plan, items=tuple(items)))
    (out / MANIFEST).write_bytes(changed.dump())
    with pytest.raises(VerificationError, match="version 99"):
        serve(out)


def streamed(monkeypatch: pytest.MonkeyPatch, name: str, change: Change | None) -> None:
    """Has vLLM's reader lose a tensor, or change it: what the files hold stays sound."""
    from vllm.model_executor.model_loader import default_loader

    read = default_loader.safetensors_weights_iterator

    def spoilt(*args: Any, **more: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for found, tensor in read(*args, **more):
            if found != name:
                yield found, tensor
            elif change is not None:
                yield found, change(tensor)

    monkeypatch.setattr(default_loader, "safetensors_weights_iterator", spoilt)


@pytest.mark.parametrize("change", [None, lambda t: t[:-1], lambda t: t.float()], ids=str)
@pytest.mark.parametrize("folder, name", [("out", VICTIM), ("experts", EXPERT)])
def test_what_never_comes_or_comes_otherwise(
    folder: str,
    name: str,
    change: Change | None,
    request: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = request.getfixturevalue(folder)
    streamed(monkeypatch, name, change)
    with pytest.raises(VerificationError, match=name):
        serve(checkpoint)


def test_no_weight_moves_after_loading(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctconvert.integrations.vllm.linear import CtconvertLinear

    seen: list[tuple[dict[str, int], dict[str, int]]] = []
    process = CtconvertLinear.process_weights_after_loading

    def pointers(layer: torch.nn.Module) -> dict[str, int]:
        return {name: p.untyped_storage().data_ptr() for name, p in layer.named_parameters()}

    def watched(self: CtconvertLinear, layer: torch.nn.Module) -> None:
        before = pointers(layer)
        process(self, layer)
        seen.append((before, pointers(layer)))

    monkeypatch.setattr(CtconvertLinear, "process_weights_after_loading", watched)
    serve(out)
    assert len(seen) == 8
    assert all(before == after for before, after in seen)
