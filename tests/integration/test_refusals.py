"""What must not be served is refused by name, and what is served is served as it lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

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

from integration.checkpoints import LLAMA, QWEN3_MOE, write_pair
from integration.engine import reading, serve

VICTIM = "model.layers.1.self_attn.k_proj.qweight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.scales"
GROUP = group_config(weight_args(4, 64))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints to copy."""
    found = {}
    for name, config in (("dense", LLAMA), ("experts", QWEN3_MOE)):
        folder = tmp_path_factory.mktemp(name)
        source, _ = write_pair(folder, GROUP, config)
        ctconvert.repack(source, folder / "out", target="triton", device="cpu")
        found[name] = folder / "out"
    return found


@pytest.fixture
def out(sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound["dense"], tmp_path / "out"))


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


@pytest.mark.parametrize("change", [None, lambda t: t[:-1], lambda t: t.float()], ids=str)
@pytest.mark.parametrize("model, name", [("dense", VICTIM), ("experts", EXPERT)])
def test_what_never_comes_or_comes_otherwise(
    sound: dict[str, Path], model: str, name: str, change: Change | None
) -> None:
    def spoilt(found: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        if found != name:
            return found, tensor
        return None if change is None else (found, change(tensor))

    with reading(spoilt), pytest.raises(VerificationError, match=name):
        serve(sound[model])


@pytest.mark.parametrize("order", [("w1", "w3"), ("w3", "w1")])
def test_what_gate_and_up_share_comes_in_any_order(order: tuple[str, str]) -> None:
    """Their kernel takes one tensor for both, which must be equal."""
    from torch.nn import Parameter

    from ctconvert.integrations.vllm.arrivals import Arrivals
    from ctconvert.integrations.vllm.cuts import Held
    from ctconvert.integrations.vllm.experts import Experts, Stack
    from ctconvert.specs import TensorSpec
    from ctconvert.store.safetensors import TensorEntry

    spec = TensorSpec("F32", (1,))
    entries = [TensorEntry(f"experts.0.{leaf}.scale", "", 0, spec) for leaf in ("gate", "up")]
    stack = Stack("w13", [[None, None]], None, {"scale": Held(spec)}, "n", (8, 8), False)  # type: ignore
    for second, fails in ((2.0, False), (3.0, True)):
        layer = object.__new__(Experts)
        expected = {("w13_scale", place): entry for place, entry in enumerate(entries)}
        layer.places, layer.rank, layer.ranks = {0: 0}, 0, 1
        layer.arrivals = Arrivals(expected, {})
        held = Parameter(torch.full((1, 1), float("nan")), requires_grad=False)

        def load(shard: str, value: float, layer: Experts = layer, held: Parameter = held) -> None:
            layer._load(stack, "scale", held, torch.tensor([value]), shard_id=shard, expert_id=0)

        load(order[0], 2.0)
        if fails:
            with pytest.raises(VerificationError, match=r"experts\.0\..*\.scale: differs from"):
                load(order[1], second)
        else:
            load(order[1], second)
            assert held.item() == 2.0


def test_what_is_changed_after_loading(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load here is watched: a method that made its weights anew would be seen."""
    from ctconvert.integrations.vllm.linear import CtconvertLinear

    def renewed(self: CtconvertLinear, layer: torch.nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()

    monkeypatch.setattr(CtconvertLinear, "process_weights_after_loading", renewed)
    with pytest.raises(AssertionError, match="was moved after loading"):
        serve(out)
