"""What vLLM's loader cannot do to a layout, and layers that the plugin does not run: by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.block_floats import nvfp4, nvfp4_group
from support.builders import (
    config_of,
    expert_modules,
    group_config,
    module,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)

import ctconvert
from ctconvert.errors import UsageError, VerificationError
from ctconvert.records import Convert

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from ctconvert.integrations.vllm import experts, vocabulary
from ctconvert.integrations.vllm.cuts import share
from ctconvert.integrations.vllm.linear import CtconvertLinear
from ctconvert.integrations.vllm.served import Served

INT4 = group_config(weight_args(4, 64))
MLP = "model.layers.0.mlp"
GATE, UP = f"{MLP}.gate_proj", f"{MLP}.up_proj"
SPARSE = {
    "quant_method": "compressed-tensors",
    "sparsity_config": {"format": "sparse-24-bitmask", "targets": ["re:.*"], "ignore": []},
}


def planned(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Any, **options: Any
) -> dict[str, Convert]:
    """The modules of a plan, by name."""
    source = write_checkpoint(folder / "in", dict(tensors), config)
    return {one.name: one for one in ctconvert.plan(source, target="cuda", **options).modules}


def int4(n: int, k: int, *names: str) -> dict[str, torch.Tensor]:
    found = {}
    for seed, name in enumerate(names):
        found |= module(name, quantised(n, k, INT4, seed))
    return found


def test_two_of_four_sparse_weights_are_not_cut(tmp_path: Path) -> None:
    made = planned(tmp_path, module(UP, sparse24(128, 256, {"weights": None}, 1)), SPARSE)
    assert made[UP].recipe.layout == "cutlass-sparse24"
    share(UP, [made[UP]], [128], 256, [128], 256)  # whole it goes
    with pytest.raises(UsageError, match=rf"{UP}: layout cutlass-sparse24 cannot .*taken whole"):
        share(UP, [made[UP]], [128], 256, [64], 256)


def test_swizzled_scales_are_neither_joined_nor_cut(tmp_path: Path) -> None:
    tensors = module(GATE, nvfp4(128, 256, 1)) | module(UP, nvfp4(128, 256, 2))
    for scale in ("weight_global_scale", "input_global_scale"):
        tensors[f"{UP}.{scale}"] = tensors[f"{GATE}.{scale}"].clone()
    chosen = {"*": "nvfp4-cutlass"}
    made = planned(tmp_path, tensors, config_of(nvfp4_group()), layout=chosen)
    for parts, ranks in (([made[GATE], made[UP]], [128, 128]), ([made[UP]], [64])):
        with pytest.raises(UsageError, match=r"nvfp4-cutlass cannot .*: it is taken whole"):
            share(UP, parts, [128] * len(parts), 256, ranks, 256)


def test_padded_rows_are_not_joined(tmp_path: Path) -> None:
    made = planned(tmp_path, int4(96, 256, GATE, UP), config_of(INT4), layout={"*": "marlin"})
    with pytest.raises(UsageError, match=r"marlin cannot be joined .*: its rows are padded"):
        share(UP, list(made.values()), [96, 96], 256, [96, 96], 256)


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        (96, 256, "96 rows are no multiple of 64"),
        (192, 96, "96 columns are no multiple of 64"),
    ],
)
def test_tiles_are_not_cut_in_two(rows: int, columns: int, says: str, tmp_path: Path) -> None:
    made = planned(tmp_path, int4(192, 256, UP), config_of(INT4), layout={"*": "marlin"})
    with pytest.raises(UsageError, match=rf"cannot .* to \[{rows}\] x {columns}: {says}"):
        share(UP, [made[UP]], [192], 256, [rows], columns)


def test_parts_in_two_layouts(tmp_path: Path) -> None:
    chosen = {"*.gate_proj": "marlin", "*.up_proj": "triton-wna16"}
    made = planned(tmp_path, int4(128, 256, GATE, UP), config_of(INT4), layout=chosen)
    with pytest.raises(UsageError, match=r"their layouts differ \(marlin, triton-wna16\)"):
        share("m", list(made.values()), [128, 128], 256, [128, 128], 256)


def test_a_layer_of_another_size(tmp_path: Path) -> None:
    made = planned(tmp_path, int4(128, 256, UP), config_of(INT4))
    with pytest.raises(UsageError, match=r"\[128\] x 256 in the manifest, \[64\] x 256 in vLLM's"):
        share(UP, [made[UP]], [64], 256, [64], 256)


def test_a_part_that_is_not_converted(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", int4(128, 256, GATE, UP), config_of(INT4))
    out = tmp_path / "out"
    ctconvert.repack(source, out, target="triton", device="cpu", exclude=[UP])
    with pytest.raises(VerificationError, match=rf"{UP} is not converted as the others are"):
        Served(str(out)).parts(f"{MLP}.gate_up_proj", ("gate_proj", "up_proj"))


def test_a_restored_checkpoint(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", int4(128, 256, UP), config_of(INT4))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    ctconvert.restore(tmp_path / "out", tmp_path / "back")
    with pytest.raises(UsageError, match="a restored checkpoint, which vLLM loads without"):
        Served(str(tmp_path / "back"))


@pytest.mark.parametrize("stored", [True, False])
def test_a_bias_on_one_side_only(stored: bool, tmp_path: Path) -> None:
    bias = {f"{UP}.bias": torch.ones(128).bfloat16()} if stored else {}
    made = planned(tmp_path, int4(128, 256, UP) | bias, config_of(INT4))
    method = CtconvertLinear([made[UP]], {})
    method.arrivals = SimpleNamespace(all_came=lambda: None)  # type: ignore[assignment]
    layer = SimpleNamespace(bias=None if stored else torch.ones(128))
    says = "has a bias" if stored else "has no bias"
    with pytest.raises(VerificationError, match=rf"{UP}: {says}, unlike vLLM's model"):
        method.process_weights_after_loading(layer)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "added"), [(2, 0), (1, 8)])
def test_a_quantised_vocabulary_is_not_cut(ranks: int, added: int, tmp_path: Path) -> None:
    group = group_config(weight_args(4, 64), ["Embedding"])
    made = planned(tmp_path, int4(128, 256, "model.embed_tokens"), config_of(group))
    method = vocabulary.Table(list(made.values()), {})
    layer = SimpleNamespace(tp_size=ranks, num_added_embeddings=added, org_vocab_size=128)
    with pytest.raises(UsageError, match="embed_tokens: vLLM does not cut a quantised vocabulary"):
        method.create_weights(layer, 256, [128], 256, 128, torch.bfloat16)


# --- experts -------------------------------------------------------------------------------------


def served(tmp_path: Path, without: str = "", bias: bool = False, **options: Any) -> Served:
    """Four experts of 128 x 256, one by one."""
    tensors = expert_modules(MLP, INT4, (128, 256), 4)
    if bias:
        rows = {"gate_proj": 128, "up_proj": 128, "down_proj": 256}
        tensors |= {
            f"{MLP}.experts.{e}.{leaf}.bias": torch.ones(n).bfloat16()
            for e in range(4)
            for leaf, n in rows.items()
        }
    tensors = {n: t for n, t in tensors.items() if not (without and n.startswith(without))}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(INT4))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu", **options)
    return Served(str(tmp_path / "out"))


def layer(activation: str = "silu", **more: Any) -> Any:
    """Experts as vLLM's model describes them."""
    parallel = SimpleNamespace(use_ep=False, tp_rank=0, tp_size=1)
    return SimpleNamespace(
        activation=activation,
        ckpt_gate_proj_name="gate_proj",
        ckpt_up_proj_name="up_proj",
        ckpt_down_proj_name="down_proj",
        expert_map=None,
        moe_config=SimpleNamespace(num_logical_experts=4, moe_parallel_config=parallel),
        **more,
    )


@pytest.mark.parametrize(
    ("activation", "more", "says"),
    [
        ("swigluoai", {}, "activation swigluoai; this plugin runs silu"),
        ("silu", {"swiglu_limit": 7.0}, "activation silu with limits"),
    ],
)
def test_another_activation(activation: str, more: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{MLP}\.experts: {says}"):
        experts.method(served(tmp_path), layer(activation, **more), f"{MLP}.experts")


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    found = served(tmp_path, without=f"{MLP}.experts.1.up_proj")
    with pytest.raises(VerificationError, match=r"experts\.1\.up_proj is not converted"):
        experts.method(found, layer(), f"{MLP}.experts")


def test_an_expert_too_many(tmp_path: Path) -> None:
    fewer = layer()
    fewer.moe_config.num_logical_experts = 3
    with pytest.raises(VerificationError, match=r"3 experts .*experts\.3\.down_proj is one more"):
        experts.method(served(tmp_path), fewer, f"{MLP}.experts")


@pytest.mark.parametrize(
    ("bias", "size", "count", "says"),
    [
        (True, 128, 4, r"experts\.0\.gate_proj: this plugin runs no experts with biases"),
        (False, 64, 4, r"down_proj: 256 x 128 in the manifest, \[256\] x 64 in vLLM's"),
        (False, 128, 5, r"experts are not repeated \(EPLB\) by this plugin"),
    ],
)
def test_experts_that_are_not_run(
    bias: bool, size: int, count: int, says: str, tmp_path: Path
) -> None:
    described = layer()
    method = experts.method(served(tmp_path, bias=bias), described, f"{MLP}.experts")
    assert method is not None
    with pytest.raises(UsageError, match=says):
        method.create_weights(described, 4, 256, size, torch.bfloat16, global_num_experts=count)


@pytest.mark.parametrize("whole", [False, True])
def test_experts_shared_out_otherwise(whole: bool, tmp_path: Path) -> None:
    """The converter gave ranks whole experts, or a share of each, and vLLM is started otherwise."""
    found = served(tmp_path, tensor_parallel=2, expert_parallel=whole)
    found.of_rank(1, 2)
    described = layer()
    described.moe_config.moe_parallel_config.use_ep = not whole
    wanted = "with" if whole else "without"
    with pytest.raises(UsageError, match=rf"serve it {wanted} --enable-expert-parallel"):
        experts.method(found, described, f"{MLP}.experts")


@pytest.mark.parametrize("linear", [True, False])
def test_stacks_hold_the_experts_of_a_linear_placement(linear: bool, tmp_path: Path) -> None:
    """Of ranks' stacks; vLLM's round robin gives rank 1 the experts 1 and 3 of four."""
    found = served(tmp_path, tensor_parallel=2, expert_parallel=True, fuse=True)
    found.of_rank(1, 2)
    described = layer(register_parameter=lambda name, data: None)
    described.moe_config.moe_parallel_config.use_ep = True
    described.expert_map = torch.tensor([-1, -1, 0, 1] if linear else [-1, 0, -1, 1])
    method = experts.method(found, described, f"{MLP}.experts")
    assert method is not None
    sizes: tuple[Any, ...] = (2, 256, 128, torch.bfloat16)
    if linear:
        method.create_weights(described, *sizes, global_num_experts=4)
        return
    says = "this rank the experts 2 to 3, vLLM others: use its linear placement"
    with pytest.raises(UsageError, match=says):
        method.create_weights(described, *sizes, global_num_experts=4)


def test_two_modules_of_one_name(tmp_path: Path) -> None:
    found = served(tmp_path)
    with pytest.raises(VerificationError, match=r"vLLM has one name, mlp, for it and .*experts\.0"):
        found.rename(lambda names: ["mlp"])
