"""Every scheme end to end: real checkpoints for every target, fresh ones, golden vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    DYNAMIC_INT8,
    LAYER,
    STATIC_INT8,
    config_of,
    group_config,
    layer,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from conftest import CHECKPOINTS, ROOT
from reference import load_tensors, read_json
from safetensors.torch import load_file
from test_repack import equal

import ctconvert
from ctconvert.errors import BadInputError, UnsupportedError
from ctconvert.layouts import TARGETS

GOLDEN = ROOT / "tests" / "golden"

#: Layouts each real checkpoint gets, by target; None where a target refuses it.
REAL: dict[str, dict[str, set[str] | None]] = {
    "smol-w4a16-g64-sym": {"triton": {"triton-wna16"}, "cuda": {"marlin"}, "xpu": {"xpu-w4a16"}},
    "smol-w4a16-g32-asym": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"triton-wna16"},
    },
    "smol-mixed-w4-w8-regex-ignore": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"triton-wna16", "xpu-w4a16"},
    },
    "smol-w8a8o8-static-sym": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"triton-wna16"},
    },
    "smol-w4a8o8-pack-static": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"xpu-w4a16"},
    },
    "smol-w4a8-int8dyn-g32-packed": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"xpu-w4a8"},
    },
    "smol-w4-embed-head-g64": {
        "triton": {"triton-wna16", "gather"},
        "cuda": {"marlin", "gather"},
        "xpu": {"xpu-w4a16", "gather"},
    },
    "smol-mxfp4a16": {"triton": None, "cuda": {"marlin-mxfp4"}, "xpu": None},
    "old071-smol-sparse24-bf16": {"triton": None, "cuda": {"cutlass-sparse24"}, "xpu": None},
    "old071-smol-sparse24-fp8-dynamic-channel": {
        "triton": None,
        "cuda": {"cutlass-sparse24"},
        "xpu": None,
    },
    "old071-rand-w4a16-g128-actorder-group-gidx": {
        "triton": None,
        "cuda": {"marlin"},
        "xpu": None,
    },
    "rand-w3a16-g128-sym": {"triton": None, "cuda": None, "xpu": None},
    "old071-rand-w3a16-g128-legacypack": {"triton": None, "cuda": None, "xpu": None},
}


def dense24(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The dense weight of a bitmask module, one row at a time, zeros positive."""
    n, k = tensors[f"{module}.shape"].flatten().tolist()
    values, mask = tensors[f"{module}.compressed"], tensors[f"{module}.bitmask"]
    raw = values.view(torch.int16 if values.element_size() == 2 else torch.int8)
    dense = torch.zeros((n, k), dtype=raw.dtype)
    for row in range(n):
        kept = (mask[row].unsqueeze(-1) >> torch.arange(8)).bitwise_and(1).flatten()[:k].bool()
        dense[row, kept] = raw[row]
    if values.element_size() == 2:
        dense[dense == -(1 << 15)] = 0
    return dense


def check_restored(source: Path, restored: Path) -> None:
    """Every tensor equals the source's; 2:4 sparse modules as dense weights."""
    before, after = load_tensors(source), load_tensors(restored)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        module, _, local = name.rpartition(".")
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        if local in ("compressed", "bitmask"):
            assert torch.equal(dense24(before, module), dense24(after, module)), module
        else:
            assert equal(after[name], tensor), name
    assert read_json(restored / "config.json") == read_json(source / "config.json")


def convert_and_back(source: Path, folder: Path, target: str, **options: Any) -> dict[str, Any]:
    """Converts, verifies against the source, restores and compares with it."""
    out = folder / f"{target}-out"
    report = ctconvert.repack(source, out, target=target, device="cpu", **options)
    ctconvert.verify(out, against=source)
    ctconvert.restore(out, folder / f"{target}-back", device="cpu")
    check_restored(source, folder / f"{target}-back")
    return report


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_for_every_target(name: str, target: str, tmp_path: Path) -> None:
    source, expected = CHECKPOINTS / name, REAL[name][target]
    if expected is None:
        with pytest.raises(UnsupportedError):
            ctconvert.repack(source, tmp_path / "out", target=target, device="cpu")
        assert not (tmp_path / "out").exists()
        return
    for fuse in (False, True):
        report = convert_and_back(source, tmp_path / str(fuse), target, fuse=fuse)
        assert set(report["layouts"]) == expected


def test_every_real_checkpoint_is_tested() -> None:
    assert {path.name for path in CHECKPOINTS.iterdir()} == set(REAL)


def fp8(dynamic: bool) -> dict[str, Any]:
    return (DYNAMIC_INT8 if dynamic else STATIC_INT8) | {"type": "float"}


#: Fresh checkpoints by name: the config group and the layout each target gives it.
FRESH: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "w8a8 int8 dynamic": (
        group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "w8a8 int8 asymmetric": (
        group_config(weight_args(8, None, False), format="int-quantized", inputs=DYNAMIC_INT8),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "w8a8 int8 per tensor, static": (
        group_config(weight_args(8, strategy="tensor"), format="int-quantized", inputs=STATIC_INT8),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "fp8 dynamic": (
        group_config(
            weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(True)
        ),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "fp8 per tensor, static": (
        group_config(
            weight_args(8, kind="float", strategy="tensor"),
            format="float-quantized",
            inputs=fp8(False),
        ),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "fp8 block-wise": (
        group_config(
            weight_args(8, kind="float", strategy="block", block_structure=[128, 128]),
            format="float-quantized",
            inputs=fp8(True) | {"strategy": "group", "group_size": 128},
        ),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "mxfp4": (
        group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"),
        {"cuda": "marlin-mxfp4"},
    ),
    "w8a16 asymmetric": (
        group_config(weight_args(8, 128, False)),
        {"triton": "triton-wna16", "cuda": "marlin", "xpu": "triton-wna16"},
    ),
    "w2a16": (
        group_config(weight_args(2, 64)),
        {"triton": "triton-wna16", "cuda": "triton-wna16", "xpu": "triton-wna16"},
    ),
    "w4a16 of an odd group size": (
        group_config(weight_args(4, 16)),
        {"triton": "triton-wna16", "cuda": "triton-wna16", "xpu": "triton-wna16"},
    ),
    "w2 static int8": (
        group_config(
            weight_args(2, 32), format="int-quantized", inputs=STATIC_INT8, outputs=STATIC_INT8
        ),
        {"triton": "triton-wna16", "cuda": "triton-wna16", "xpu": "triton-wna16"},
    ),
    "w4a8 in int8": (
        group_config(weight_args(4, 128), format="int-quantized", inputs=DYNAMIC_INT8),
        {"triton": "triton-wna16", "cuda": "marlin", "xpu": "xpu-w4a8"},
    ),
}


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("fuse", [False, True])
def test_fresh_checkpoints(name: str, fuse: bool, tmp_path: Path) -> None:
    group, layouts = FRESH[name]
    tensors = layer(group)
    for module in ("q", "k", "v"):  # so that static scales allow the parts to be fused
        for end in ("input", "output"):
            key = f"model.layers.0.self_attn.{module}_proj.{end}_scale"
            if key in tensors:
                tensors[key] = tensors[f"model.layers.0.self_attn.q_proj.{end}_scale"].clone()
    tensors.pop("model.layers.0.self_attn.q_proj.bias")
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group), shards=3)
    for target in TARGETS:
        if target not in layouts:
            with pytest.raises(UnsupportedError):
                ctconvert.repack(source, tmp_path / target, target=target, device="cpu")
            continue
        report = convert_and_back(source, tmp_path, target, fuse=fuse, max_shard_size=100_000)
        assert set(report["layouts"]) == {layouts[target]}
        names = load_tensors(tmp_path / f"{target}-out")
        fused = any(".qkv_proj." in tensor for tensor in names)
        assert fused == (fuse and name != "fp8 block-wise"), report["notes"]


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8 channel", "fp8 tensor static", "int8"])
@pytest.mark.parametrize("fuse", [False, True])
def test_fresh_sparse_checkpoints(kind: str, fuse: bool, tmp_path: Path) -> None:
    groups = {
        "fp8 channel": group_config(
            weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(True)
        ),
        "fp8 tensor static": group_config(
            weight_args(8, kind="float", strategy="tensor"),
            format="float-quantized",
            inputs=fp8(False),
        ),
        "int8": group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
    }
    group = groups.get(kind)
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    tensors = {"model.norm.weight": torch.ones(256, dtype=dtype)}
    shapes = (("q_proj", 72, 192), ("k_proj", 40, 192), ("v_proj", 40, 192), ("o_proj", 96, 96))
    for seed, (leaf, n, k) in enumerate(shapes):
        made = sparse24(n, k, group or {"weights": None}, seed, dtype)
        if "input_scale" in made:
            made["input_scale"] = torch.full((1,), 0.03, dtype=torch.bfloat16)
        tensors |= {f"model.layers.0.self_attn.{leaf}.{local}": t for local, t in made.items()}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    if group:
        config |= config_of(group)
    source = write_checkpoint(tmp_path / "in", tensors, config, shards=2)
    convert_and_back(source, tmp_path, "cuda", fuse=fuse)
    made = load_tensors(tmp_path / "cuda-out")
    name = "model.layers.0.self_attn." + ("qkv_proj" if fuse else "q_proj")
    rows = 152 if fuse else 72
    assert made[f"{name}.weight"].shape == (rows, 96)
    assert made[f"{name}.meta"].shape == (192 if fuse else 128, 256 // 8)
    scale = made[f"{name}.weight_scale"]
    assert scale.dtype == torch.float32
    if group is None:
        assert scale.tolist() == [1.0]
        assert made[f"{name}.input_scale"].tolist() == [1.0]
    else:
        assert scale.shape == (rows, 1)
        parts = [tensors[f"model.layers.0.self_attn.{p}_proj.weight_scale"] for p in "qkv"]
        first = parts[0].float().flatten()
        assert torch.equal(scale[:72, 0], first.expand(72))
        assert (f"{name}.input_scale" in made) == (kind == "fp8 tensor static")


def golden(file: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / file)


def test_marlin_mxfp4_is_what_the_kernel_library_makes(tmp_path: Path) -> None:
    vectors = golden("marlin_mxfp4.safetensors")
    tensors = {
        f"a.up_proj.{name}": vectors[f"mxfp4_marlin.{name}"]
        for name in ("weight_packed", "weight_scale")
    }
    group = group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized")
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    made = load_tensors(tmp_path / "out")
    assert torch.equal(made["a.up_proj.weight"], vectors["mxfp4_marlin.out_weight"])
    assert torch.equal(made["a.up_proj.weight_scale"], vectors["mxfp4_marlin.out_scale_u8"])


@pytest.mark.parametrize("key", ["w4.K128.N64", "w4.K256.N128", "w8.K128.N64", "w8.K256.N128"])
def test_marlin_is_what_the_kernel_library_makes(key: str, tmp_path: Path) -> None:
    vectors = golden("marlin_repack.safetensors")
    words = vectors[f"marlin_repack.{key}.in"].t().contiguous()  # [K/f, N] to the source's [N, K/f]
    bits = int(key[1])
    n, k = words.shape[0], words.shape[1] * 32 // bits
    group = group_config(weight_args(bits, 64))
    tensors = {
        "a.up_proj.weight_packed": words,
        "a.up_proj.weight_scale": torch.rand(n, k // 64, dtype=torch.float16),
        "a.up_proj.weight_shape": torch.tensor([n, k]),
    }
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    made = load_tensors(tmp_path / "out")
    assert torch.equal(made["a.up_proj.qweight"], vectors[f"marlin_repack.{key}.out"])
    scales = made["a.up_proj.scales"].reshape(k // 64, n // 64, 8, 8).transpose(2, 3)
    assert torch.equal(scales.reshape(k // 64, n).t(), tensors["a.up_proj.weight_scale"])


def test_cutlass_is_what_the_kernel_library_makes(tmp_path: Path) -> None:
    vectors = golden("cutlass_sparse24.safetensors")
    names = [key.removesuffix(".dense") for key in vectors if key.endswith(".dense")]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if ".F8." in name or ".S8." in name:
            continue  # they need a scheme; the transforms' own tests hold them
        dense = vectors[f"{name}.dense"]
        n, k = dense.shape
        raw = dense.view(torch.int16)
        # keep the nonzero columns and fill each group up to two from the left
        nonzero = (raw.reshape(n, -1, 4) != 0).int()
        order = (nonzero * 8 - torch.arange(4)).argsort(-1, descending=True)[..., :2]
        kept = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(-1, order, True).reshape(n, k)
        module = f"m{len(tensors)}.{name.replace('.', '_')}"
        bits = kept.reshape(n, -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
        tensors[f"{module}.compressed"] = raw[kept].reshape(n, k // 2).view(dense.dtype)
        tensors[f"{module}.bitmask"] = bits.sum(-1).to(torch.uint8)
        tensors[f"{module}.shape"] = torch.tensor([[n], [k]])
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": []}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    source = write_checkpoint(tmp_path / "in", tensors, config)
    ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    made = load_tensors(tmp_path / "out")
    for module in {name.rpartition(".")[0] for name in tensors}:
        name = module.partition(".")[2].replace("_", ".")
        assert equal(made[f"{module}.weight"], vectors[f"{name}.nzs"]), name
        assert torch.equal(made[f"{module}.meta"], vectors[f"{name}.meta"]), name
    assert len(tensors) == 3 * 12


def test_partially_sparse(tmp_path: Path) -> None:
    group = group_config(
        weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(True)
    )
    tensors = {}
    for leaf, made in (
        ("q_proj", sparse24(64, 128, group, 1)),
        ("o_proj", quantised(64, 128, group, 2)),
    ):
        tensors |= {f"model.layers.0.self_attn.{leaf}.{local}": t for local, t in made.items()}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["re:.*o_proj"]}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group, sparsity_config=sparsity))
    report = convert_and_back(source, tmp_path, "cuda")
    assert report["layouts"] == {"cutlass-sparse24": 1, "scaled-mm": 1}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("packing", ["dense", "padded"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_embeddings_of_every_width(
    bits: int, packing: str, symmetric: bool, tmp_path: Path
) -> None:
    group = group_config(weight_args(bits, 32, symmetric), ["Embedding"])
    made = quantised(48, 96, group, bits)
    if packing == "padded" and 32 % bits:
        from ctconvert.transforms.packed import pack, unpack

        codes = unpack(made["weight_packed"], bits, 96)
        made["weight_packed"] = pack(codes, bits, "padded")
        if not symmetric:
            zero = unpack(made["weight_zero_point"].t().contiguous(), bits, 48)
            made["weight_zero_point"] = pack(zero, bits, "padded").t().contiguous()
    tensors = {f"model.embed_tokens.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    for target in TARGETS:
        report = convert_and_back(source, tmp_path, target)
        assert report["layouts"] == {"gather": 1}
    out = tmp_path / "cuda-out"
    table = load_tensors(out)["model.embed_tokens.weight_packed"]
    assert torch.equal(table, made["weight_packed"])
    details = read_json(out / "ctconvert.json")["modules"]["model.embed_tokens"]["details"]
    assert details["packing"] == (packing if 32 % bits else "dense")


def test_a_quantised_head_is_a_linear(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32), ["Linear", "Embedding"])
    tensors = {}
    for name in ("model.embed_tokens", "lm_head"):
        made = quantised(128, 64, group, len(name))
        tensors |= {f"{name}.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group, ignore=[]))
    report = convert_and_back(source, tmp_path, "triton")
    assert report["layouts"] == {"gather": 1, "triton-wna16": 1}


STATIC = group_config(weight_args(4, 32), inputs=STATIC_INT8, outputs=STATIC_INT8)


def static_checkpoint(folder: Path, **changed: torch.Tensor) -> Path:
    made = quantised(64, 96, STATIC, 1) | changed
    tensors = {f"a.down_proj.{local}": tensor for local, tensor in made.items()}
    return write_checkpoint(folder, tensors, config_of(STATIC))


def test_activation_scales_ride_along(tmp_path: Path) -> None:
    source = static_checkpoint(tmp_path / "in")
    before = load_tensors(source)
    for target in TARGETS:
        convert_and_back(source, tmp_path, target)
        made = load_tensors(tmp_path / f"{target}-out")
        for name in ("a.down_proj.input_scale", "a.down_proj.output_scale"):
            assert made[name].dtype == torch.float32
            assert torch.equal(made[name], before[name].float())


def test_a_scale_of_zero_was_never_calibrated(tmp_path: Path) -> None:
    source = static_checkpoint(tmp_path / "in", output_scale=torch.zeros(1, dtype=torch.bfloat16))
    report = convert_and_back(source, tmp_path, "triton")
    assert "a.down_proj.output_scale" not in load_tensors(tmp_path / "triton-out")
    assert any("output_scale" in note and "never calibrated" in note for note in report["notes"])


def test_activation_zero_points_are_not_ignored(tmp_path: Path) -> None:
    zero = torch.zeros(1, dtype=torch.int8)
    source = static_checkpoint(tmp_path / "zero", input_zero_point=zero)
    convert_and_back(source, tmp_path, "triton")
    source = static_checkpoint(tmp_path / "three", input_zero_point=zero + 3)
    for target in TARGETS:
        with pytest.raises(UnsupportedError, match="input_zero_point is 3"):
            ctconvert.repack(source, tmp_path / "out", target=target, device="cpu")


def test_asymmetric_activations_keep_their_zero_point(tmp_path: Path) -> None:
    inputs = STATIC_INT8 | {"symmetric": False}
    group = group_config(weight_args(8, None), format="int-quantized", inputs=inputs)
    made = quantised(64, 96, group, 1) | {"input_zero_point": torch.tensor([-7], dtype=torch.int8)}
    tensors = {f"a.down_proj.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    convert_and_back(source, tmp_path, "cuda")
    made = load_tensors(tmp_path / "cuda-out")
    assert made["a.down_proj.input_zero_point"].tolist() == [-7]


def test_act_order_is_sorted(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj"
    source = CHECKPOINTS / "old071-rand-w4a16-g128-actorder-group-gidx"
    ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    g_idx = before[f"{name}.weight_g_idx"]
    perm = after[f"{name}.g_idx_sort_indices"]
    assert torch.equal(g_idx[perm.long()], g_idx.sort().values)
    assert sorted(perm.tolist()) == list(range(1024))


def test_padded_shapes_are_recorded(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    made = quantised(72, 160, group, 1)
    tensors = {f"a.down_proj.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    convert_and_back(source, tmp_path, "cuda")
    record = read_json(tmp_path / "cuda-out" / "ctconvert.json")["modules"]["a.down_proj"]
    assert record["layout"] == "marlin"
    assert record["shape"] == [72, 160]
    assert record["details"]["padded_shape"] == [128, 192]
    assert load_tensors(tmp_path / "cuda-out")["a.down_proj.qweight"].shape == (12, 256)


def test_moe_experts_are_linears(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    tensors = {"model.layers.0.mlp.gate.weight": torch.randn(2, 64, dtype=torch.bfloat16)}
    for expert in range(2):
        for leaf in ("gate_proj", "up_proj"):
            made = quantised(128, 64, group, expert)
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}"
            tensors |= {f"{name}.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    report = convert_and_back(source, tmp_path, "cuda", fuse=True)
    assert report["modules"] == 2
    assert "model.layers.0.mlp.experts.1.gate_up_proj.qweight" in load_tensors(
        tmp_path / "cuda-out"
    )


def test_three_dimensional_experts_come_back(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32, symmetric=False), ["re:.*experts.*"])
    name = "model.layers.0.mlp.experts.down_proj"
    each = [quantised(64, 96, group, seed) for seed in range(3)]
    tensors = {
        f"{name}.{local}": torch.stack([made[local] for made in each])
        for local in ("weight_packed", "weight_scale", "weight_zero_point")
    }
    tensors[f"{name}.weight_shape"] = torch.tensor([3, 64, 96])
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    for target in ("triton", "cuda"):
        convert_and_back(source, tmp_path, target)


UNREAD = {
    "nvfp4-pack-quantized": (weight_args(4, 16, kind="float", strategy="tensor_group"), "NVFP4"),
    "mxfp8-quantized": (weight_args(8, 32, kind="float"), "MXFP8"),
    "marlin-24": (weight_args(4, 128), "marlin-24"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_formats_without_a_layout_are_recognised_and_refused(name: str, tmp_path: Path) -> None:
    weights, word = UNREAD[name]
    if name.startswith("nvfp4"):
        weights["group_size"] = 16
    group = group_config(weights, format=name)
    tensors = {
        "a.down_proj.weight_packed": torch.zeros(64, 16, dtype=torch.uint8),
        "a.down_proj.weight_scale": torch.ones(64, 2),
    }
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    found = ctconvert.inspect(source)
    assert word in found["modules"][0]["unsupported"]
    for target in TARGETS:
        with pytest.raises(UnsupportedError, match=word):
            ctconvert.repack(source, tmp_path / "out", target=target, device="cpu")
    ctconvert.repack(source, tmp_path / "kept", target="cuda", device="cpu", keep_unsupported=True)
    after = load_tensors(tmp_path / "kept")
    assert all(equal(after[name], tensor) for name, tensor in tensors.items())
    assert word in read_json(tmp_path / "kept" / "ctconvert.json")["kept"]["a.down_proj"]


def test_a_sum_that_could_leave_int32_is_refused(tmp_path: Path) -> None:
    group = group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8)
    for k in (65536, 65552):
        made = quantised(16, k, group, 1)
        tensors = {f"model.down_proj.{local}": tensor for local, tensor in made.items()}
        source = write_checkpoint(tmp_path / f"{k}", tensors, config_of(group))
        out = tmp_path / f"{k}-out"
        if k == 65536:
            ctconvert.repack(source, out, target="triton", device="cpu")
            continue
        with pytest.raises(UnsupportedError, match="K = 65552: an int32 sum"):
            ctconvert.repack(source, out, target="triton", device="cpu")


@pytest.mark.parametrize(("n", "k", "kind"), [(60, 128, ""), (64, 72, ""), (64, 80, "int8")])
def test_a_sparse_module_that_the_kernel_cannot_read_is_refused(
    n: int, k: int, kind: str, tmp_path: Path
) -> None:
    group = group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8)
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    made = sparse24(n, k, group if kind else {"weights": None}, 1)
    tensors = {f"model.q_proj.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config | (config_of(group) if kind else {}))
    with pytest.raises(UnsupportedError, match=f"{n}x{k}: the kernel copies 16 bytes"):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_rotated_module_is_refused(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    transform = {
        "config_groups": {
            "u": {
                "type": "hadamard",
                "apply": [{"targets": ["re:.*o_proj"], "location": "input", "ignore": []}],
            }
        }
    }
    tensors = {}
    for leaf in ("o_proj", "q_proj"):
        made = quantised(64, 64, group, 1)
        tensors |= {f"a.{leaf}.{local}": tensor for local, tensor in made.items()}
    config = config_of(group, transform_config=transform)
    source = write_checkpoint(tmp_path / "in", tensors, config)
    with pytest.raises(UnsupportedError, match=r"a\.o_proj.*transform_config") as error:
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    assert "a.q_proj" not in str(error.value)


@pytest.mark.parametrize("count", [3, 1])
def test_a_mask_that_does_not_keep_two_of_four(count: int, tmp_path: Path) -> None:
    made = sparse24(64, 128, {"weights": None}, 1)
    made["bitmask"][5, 3] = 0b0111_0011 if count == 3 else 0b0100_0011
    tensors = {f"a.down_proj.{local}": tensor for local, tensor in made.items()}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    source = write_checkpoint(tmp_path / "in", tensors, config)
    with pytest.raises(BadInputError, match=rf"a\.down_proj.*row 5.*{count} of 4"):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")


def test_kv_cache_scales_are_copied(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    tensors = {
        f"model.layers.0.self_attn.k_proj.{local}": tensor
        for local, tensor in quantised(64, 64, group, 1).items()
    }
    for name in ("k_scale", "v_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.rand(1, dtype=torch.bfloat16)
    scheme = STATIC_INT8 | {"type": "float"}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group, kv_cache_scheme=scheme))
    convert_and_back(source, tmp_path, "triton")
    config = json.loads((tmp_path / "triton-out" / "config.json").read_text())
    assert config["quantization_config"]["source"]["kv_cache_scheme"] == scheme


def test_widths_of_fused_parts_are_recorded(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    tensors = layer(group)
    tensors.pop("model.layers.0.self_attn.q_proj.bias")
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    for target in TARGETS:
        ctconvert.repack(source, tmp_path / target, target=target, device="cpu", fuse=True)
        modules = read_json(tmp_path / target / "ctconvert.json")["modules"]
        parts = modules["model.layers.0.self_attn.qkv_proj"]["parts"]
        assert [part["rows"] for part in parts] == [n for _, n, _ in LAYER[:3]]


def test_restore_checks_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from ctconvert.errors import ConversionError

    out, back = tmp_path / "out", tmp_path / "back"
    ctconvert.repack(CHECKPOINTS / "smol-w4a16-g64-sym", out, target="cuda", device="cpu")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match=r"needs .* GB and .* are free"):
        ctconvert.restore(out, back, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
