"""The main job: real and fresh checkpoints to ``triton-wna16``, against compressed-tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import LAYER, config_of, group_config, layer, quantised, weight_args, write_checkpoint
from conftest import CHECKPOINTS, EXAMPLE
from reference import load_tensors, read_json, triton_wna16

import ctconvert
from ctconvert.errors import UnsupportedError, VerificationError


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, dtype and shape included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def check_against_reference(source: Path, out: Path, bits: dict[str, int]) -> None:
    """Every module equals the reference; every other tensor is the source's own."""
    before, after = load_tensors(source), load_tensors(out)
    expected = {}
    for name, tensor in before.items():
        module, _, local = name.rpartition(".")
        if module not in bits or local == "bias":
            expected[name] = tensor
        elif local in ("input_scale", "output_scale"):
            expected[name] = tensor.float()
    for module, width in bits.items():
        made = triton_wna16(before, module, width)
        expected |= {f"{module}.{local}": tensor for local, tensor in made.items()}
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert equal(after[name], tensor), name


REAL = {
    "smol-w4a16-g64-sym": 4,
    "smol-w4a16-g32-asym": 4,
    "smol-w4a8-int8dyn-g32-packed": 4,
    "smol-w4a8o8-pack-static": 4,
    "smol-w8a8o8-static-sym": 8,
}


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name: str, tmp_path: Path) -> None:
    source = CHECKPOINTS / name
    report = ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    modules = {
        tensor.rpartition(".")[0]: REAL[name]
        for tensor in load_tensors(source)
        if tensor.endswith(".weight_scale")
    }
    assert report["layouts"] == {"triton-wna16": len(modules)}
    check_against_reference(source, tmp_path / "out", modules)
    ctconvert.verify(tmp_path / "out", against=source)


def test_mixed_widths_by_pattern_and_ignore(tmp_path: Path) -> None:
    source = CHECKPOINTS / "smol-mixed-w4-w8-regex-ignore"
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    attention = "model.layers.{}.self_attn.{}_proj"
    bits = {attention.format(0, part): 8 for part in "qkv"} | {attention.format(1, "v"): 8}
    bits["model.layers.1.mlp.up_proj"] = 4
    check_against_reference(source, tmp_path / "out", bits)
    assert f"{attention.format(1, 'k')}.weight" in load_tensors(tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fresh_checkpoints(bits: int, group: int | None, symmetric: bool, tmp_path: Path) -> None:
    dtype = torch.float16 if symmetric == (bits == 4) else torch.bfloat16
    scheme = group_config(weight_args(bits, group, symmetric))
    tensors = layer(scheme, dtype, seed=bits)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(scheme), shards=5)
    for out, shard_size in (("one", 5_000_000_000), ("many", 60_000)):
        ctconvert.repack(
            source, tmp_path / out, target="triton", device="cpu", max_shard_size=shard_size
        )
        check_against_reference(source, tmp_path / out, {name: bits for name, _, _ in LAYER})
        ctconvert.verify(tmp_path / out, against=source)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    index = read_json(tmp_path / "many" / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == load_tensors(tmp_path / "many").keys()


def test_columns_that_do_not_fill_a_word(tmp_path: Path) -> None:
    scheme = group_config(weight_args(4, None, symmetric=False))
    made = quantised(24, 44, scheme, seed=1)
    tensors = {f"a.down_proj.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(scheme))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    check_against_reference(source, tmp_path / "out", {"a.down_proj": 4})
    ctconvert.verify(tmp_path / "out", against=source)


def test_int_quantized_codes_are_packed(tmp_path: Path) -> None:
    from builders import DYNAMIC_INT8

    scheme = group_config(weight_args(4, 32), format="int-quantized", inputs=DYNAMIC_INT8)
    source = write_checkpoint(tmp_path / "in", layer(scheme), config_of(scheme))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    check_against_reference(source, tmp_path / "out", {name: 4 for name, _, _ in LAYER})
    ctconvert.verify(tmp_path / "out", against=source)


def test_fused_modules_stack_in_order(tmp_path: Path) -> None:
    scheme = group_config(weight_args(4, 64, symmetric=False))
    tensors = layer(scheme)
    attention = "model.layers.0.self_attn"
    for part, n in (("k", 64), ("v", 64)):
        tensors[f"{attention}.{part}_proj.bias"] = torch.randn(n, dtype=torch.bfloat16)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(scheme), shards=3)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu", fuse=True)
    after = load_tensors(tmp_path / "out")
    parts = [f"{attention}.{part}_proj" for part in "qkv"]
    separate = [triton_wna16(tensors, part, 4) for part in parts]
    for local in ("qweight", "scales", "qzeros"):
        joined = torch.cat([made[local] for made in separate], dim=1)
        assert equal(after[f"{attention}.qkv_proj.{local}"], joined)
    bias = torch.cat([tensors[f"{part}.bias"] for part in parts])
    assert equal(after[f"{attention}.qkv_proj.bias"], bias)
    assert not any(name.startswith(tuple(parts)) for name in after)
    record = read_json(tmp_path / "out" / "ctconvert.json")["modules"][f"{attention}.qkv_proj"]
    assert [(part["name"], part["rows"]) for part in record["parts"]] == [
        (parts[0], 192),
        (parts[1], 64),
        (parts[2], 64),
    ]
    assert "model.layers.0.mlp.gate_up_proj.qweight" in after
    ctconvert.verify(tmp_path / "out", against=source)


def test_parts_that_differ_stay_apart(tmp_path: Path) -> None:
    scheme = group_config(weight_args(4, 64))
    tensors = layer(scheme)
    module = "model.layers.0.self_attn.k_proj"
    for local in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{module}.{local}"]
    tensors[f"{module}.weight"] = torch.randn(64, 256, dtype=torch.bfloat16)
    config = config_of(scheme, ignore=["lm_head", module])
    source = write_checkpoint(tmp_path / "in", tensors, config)
    report = ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu", fuse=True)
    after = load_tensors(tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.qweight" in after
    assert f"{module}.weight" in after
    assert any("qkv_proj is not fused" in note and module in note for note in report["notes"])
    ctconvert.verify(tmp_path / "out", against=source)


def test_three_dimensional_experts(tmp_path: Path) -> None:
    scheme = group_config(weight_args(4, 32, symmetric=False), ["re:.*experts.*"])
    name = "model.layers.0.mlp.experts.down_proj"
    each = [quantised(48, 96, scheme, seed) for seed in range(3)]
    tensors = {
        f"{name}.{local}": torch.stack([made[local] for made in each])
        for local in ("weight_packed", "weight_scale", "weight_zero_point")
    }
    tensors[f"{name}.weight_shape"] = torch.tensor([3, 48, 96])
    source = write_checkpoint(tmp_path / "in", tensors, config_of(scheme))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    after = load_tensors(tmp_path / "out")
    for index, made in enumerate(each):
        single = {f"m.{local}": tensor for local, tensor in made.items()}
        for local, tensor in triton_wna16(single, "m", 4).items():
            assert equal(after[f"{name}.{local}"][index], tensor)
    ctconvert.verify(tmp_path / "out", against=source)


def test_output_is_described(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ctconvert.repack(EXAMPLE, out, target="triton", device="cpu")
    config, original = read_json(out / "config.json"), read_json(EXAMPLE / "config.json")
    ours = config.pop("quantization_config")
    assert ours["source"] == original.pop("quantization_config")
    assert config == original
    assert ours["quant_method"] == "ctconvert"
    assert ours["modules"] == {"triton-wna16": 14}
    manifest = read_json(out / "ctconvert.json")
    assert manifest["source"]["files"][0]["size"] == (EXAMPLE / "model.safetensors").stat().st_size
    module = manifest["modules"]["model.layers.0.mlp.down_proj"]
    assert (module["shape"], module["layout"], module["group_size"]) == (
        [576, 1536],
        "triton-wna16",
        64,
    )
    generation = "generation_config.json"
    assert (out / generation).read_bytes() == (EXAMPLE / generation).read_bytes()


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    for out, workers in (("a", 1), ("b", 6)):
        ctconvert.repack(EXAMPLE, tmp_path / out, target="triton", device="cpu", workers=workers)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_unsupported_module_stops_everything_or_is_kept(tmp_path: Path) -> None:
    source = CHECKPOINTS / "rand-w3a16-g128-sym"
    with pytest.raises(UnsupportedError, match=r"k_proj.*3-bit(.|\n)*v_proj.*3-bit"):
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    assert not list(tmp_path.iterdir())
    report = ctconvert.repack(
        source, tmp_path / "out", target="triton", device="cpu", keep_unsupported=True
    )
    assert len(report["kept"]) == 2
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(equal(before[name], after[name]) for name in before)
    ctconvert.verify(tmp_path / "out", against=source)


def test_a_layout_can_be_chosen_by_name(tmp_path: Path) -> None:
    plan = ctconvert.plan(EXAMPLE, target="cuda", layout={"*.q_proj": "triton-wna16"})
    chosen = {module.name: module.layout.name for module in plan.modules}
    assert chosen["model.layers.0.self_attn.q_proj"] == "triton-wna16"


def test_the_dry_run_reads_no_weight_data(tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(EXAMPLE, source)
    planned = ctconvert.plan(source, target="triton")
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    begin = min(
        entry.offset
        for name, entry in planned.description.source.tensors.items()
        if not name.endswith("weight_shape")
    )
    data[begin:] = b"\xff" * (len(data) - begin)
    path.write_bytes(data)
    again = ctconvert.plan(source, target="triton")
    assert [shard.header for shard in again.shards] == [shard.header for shard in planned.shards]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ctconvert.repack(CHECKPOINTS / "smol-w4a16-g32-asym", out, target="triton", device="cpu")
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    for index, (name, entry) in enumerate(header.items()):
        position = 8 + length + entry["data_offsets"][index % 2] - index % 2
        data[position] ^= 1 << (index % 8)
        path.write_bytes(data)
        with pytest.raises(VerificationError, match=name):
            ctconvert.verify(out)
        data[position] ^= 1 << (index % 8)
    path.write_bytes(data)
    ctconvert.verify(out)


def test_bits_behind_the_last_code_are_not_lost_in_silence(tmp_path: Path) -> None:
    from ctconvert.errors import BadInputError

    scheme = group_config(weight_args(4, None))
    made = quantised(24, 44, scheme, seed=1)
    made["weight_packed"][5, -1] |= 1 << 20
    tensors = {f"a.down_proj.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(scheme))
    with pytest.raises(BadInputError, match=r"a\.down_proj.*row 5"):
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")


def test_an_override_for_nothing_is_an_error() -> None:
    from ctconvert.errors import UsageError

    with pytest.raises(UsageError, match=r"\*\.w1=triton-wna16"):
        ctconvert.plan(EXAMPLE, target="cuda", layout={"*.w1": "triton-wna16"})
    plan = ctconvert.plan(EXAMPLE, target="cuda", fuse=True, layout={"re:.*qkv": "triton-wna16"})
    assert {module.layout.name for module in plan.modules} == {"triton-wna16", "marlin"}


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    from ctconvert.errors import UsageError

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(UsageError, match="is no checkpoint"):
        ctconvert.repack(EXAMPLE, tmp_path / "home", target="triton", device="cpu", overwrite=True)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"


def test_dense_weights_of_other_classes_are_copied(tmp_path: Path) -> None:
    scheme = group_config(weight_args(4, 32))
    tensors = layer(scheme)
    other = {
        "model.layers.0.mixer.conv1d.weight": torch.randn(64, 1, 4),
        "model.layers.0.mlp.gate.weight": torch.randn(8, 256),
        "model.layers.0.attn.relative_attention_bias.weight": torch.randn(32, 8),
        "model.pos_embed.weight": torch.randn(16, 256),
    }
    source = write_checkpoint(tmp_path / "in", tensors | other, config_of(scheme))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    after = load_tensors(tmp_path / "out")
    assert all(equal(after[name], tensor) for name, tensor in other.items())
