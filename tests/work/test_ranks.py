"""Checkpoints cut for tensor-parallel ranks: what each rank has, put together, is the whole.

What a rank should have is cut here by hand out of the weights of a conversion that is not cut.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.builders import (
    config_of,
    expert_modules,
    experts,
    group_config,
    module,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from support.reference import load_tensors
from support.roundtrip import convert_and_back
from support.schemes import LAYOUT_GROUPS, module_of
from support.tamper import flip_bit

import ctconvert
from ctconvert import codec
from ctconvert.errors import BadInputError, UnsupportedError, UsageError, VerificationError
from ctconvert.layouts import LAYOUTS
from ctconvert.output import Output
from ctconvert.records import Manifest
from ctconvert.runtime import load
from ctconvert.store.local import LocalStore
from ctconvert.transforms import cuts
from ctconvert.transforms.dense import dense_weight
from ctconvert.work import build
from ctconvert.work.transforming import read_tensor

#: Eight heads of 32, two of keys and values; N differs from K everywhere.
HIDDEN, SIZE, HEADS, SHARED, HEAD, VOCABULARY = 256, 768, 8, 2, 32, 128
MODEL = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED,
    "head_dim": HEAD,
}
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"
SHAPES = {
    f"{ATTENTION}.q_proj": (HEADS * HEAD, HIDDEN + 128),
    f"{ATTENTION}.k_proj": (SHARED * HEAD, HIDDEN + 128),
    f"{ATTENTION}.v_proj": (SHARED * HEAD, HIDDEN + 128),
    f"{ATTENTION}.o_proj": (HIDDEN + 128, HEADS * HEAD),
    f"{MLP}.gate_proj": (SIZE, HIDDEN),
    f"{MLP}.up_proj": (SIZE, HIDDEN),
    f"{MLP}.down_proj": (HIDDEN, SIZE),
}
INT4 = group_config(weight_args(4, 32, False))


def written(folder: Path, group: dict[str, Any] = INT4, biased: bool = False) -> Path:
    """A layer of attention and an MLP."""
    tensors = {"model.norm.weight": torch.ones(HIDDEN)}
    for seed, (name, (n, k)) in enumerate(SHAPES.items()):
        tensors |= module(name, module_of(n, k, group, seed))
        if biased:
            tensors[f"{name}.bias"] = torch.randn(n).bfloat16()
    return write_checkpoint(folder / "in", tensors, config_of(group), **MODEL)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The dense f32 weights of an output's modules, of a stack [E, N, K], without padding."""
    output, cpu = Output.open(out), torch.device("cpu")
    found = {}
    for item in output.plan.modules:
        each = [
            dense_weight(
                cuts.join_rows(
                    [
                        one.weight
                        for one in codec.decode(
                            item, unit, lambda entry: read_tensor(output.store, entry), cpu
                        )
                    ]
                )
            )
            for unit in range(len(item.units))
        ]
        found[item.name] = each[0] if item.experts is None else torch.stack(each)
    return found


def share(name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What a rank has of a weight [..., N, K]."""
    if name.endswith(("o_proj", "down_proj", "w2")):
        return whole.chunk(ranks, -1)[rank]
    if name.endswith(("k_proj", "v_proj")) and ranks > SHARED:
        return whole.chunk(SHARED, -2)[rank * SHARED // ranks]
    return whole.chunk(ranks, -2)[rank]


def check(source: Path, folder: Path, ranks: int, target: str = "cuda", **options: Any) -> Path:
    """Cuts a checkpoint, there and back, and holds every rank against the uncut weights."""
    convert_and_back(source, folder, target, tensor_parallel=ranks, **options)
    out = folder / f"{target}-out"
    ctconvert.repack(source, folder / "whole", target=target, device="cpu", **options)
    whole, found = weights(folder / "whole"), weights(out)
    assert len(found) == ranks * len(whole)
    for name, weight in whole.items():
        for rank in range(ranks):
            assert torch.equal(found[f"rank{rank}.{name}"], share(name, weight, rank, ranks)), name
    return out


def test_every_layout_is_tried() -> None:
    assert LAYOUT_GROUPS.keys() == {one.name for one in LAYOUTS} - {"cutlass-sparse24", "gather"}


@pytest.mark.parametrize("layout", LAYOUT_GROUPS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    """Rows of 384 and columns of 384 a rank, which some layouts pad."""
    group = LAYOUT_GROUPS[layout][0]
    tensors = {
        name: tensor
        for seed, leaf in enumerate(("gate_proj", "down_proj"))
        for name, tensor in module(
            f"{MLP}.{leaf}", module_of(*SHAPES[f"{MLP}.{leaf}"], group, seed)
        ).items()
    }
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    check(source, tmp_path, 2, layout={"*": layout})


def test_2_4_sparse(tmp_path: Path) -> None:
    group = group_config(None, format="sparse-24-bitmask")
    sparsity = {"format": "sparse-24-bitmask", "targets": ["re:.*"], "ignore": []}
    tensors = module(f"{MLP}.gate_proj", sparse24(192, 256, group, 0))
    tensors |= module(f"{MLP}.down_proj", sparse24(256, 384, group, 1))
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    check(write_checkpoint(tmp_path / "in", tensors, config), tmp_path, 2)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_heads_of_keys_and_values_are_repeated(ranks: int, tmp_path: Path) -> None:
    out = check(written(tmp_path), tmp_path, ranks, "triton")
    names = {path.name for path in out.glob("model-rank-*")}
    assert names == {
        f"model-rank-{rank:05}-of-{ranks:05}-00001-of-00001.safetensors" for rank in range(ranks)
    }
    made = load_tensors(out)
    for rank in range(ranks):
        assert made[f"rank{rank}.{MLP}.down_proj.scales"].shape == (SIZE // ranks // 32, HIDDEN)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_scale_of_a_channel_is_every_ranks(bits: int, tmp_path: Path) -> None:
    out = check(written(tmp_path, group_config(weight_args(bits, None))), tmp_path, 2, "triton")
    made = load_tensors(out)
    down = [made[f"rank{rank}.{MLP}.down_proj.scales"] for rank in range(2)]
    assert torch.equal(*down)
    assert down[0].shape == (1, HIDDEN)


def test_fused_modules_are_joined_of_the_ranks_of_their_parts(tmp_path: Path) -> None:
    source, ranks = written(tmp_path, biased=True), 4
    convert_and_back(source, tmp_path, "cuda", tensor_parallel=ranks, fuse=True)
    ctconvert.repack(source, tmp_path / "whole", target="cuda", device="cpu")
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "cuda-out")
    before = load_tensors(source)
    for fused, leaves in {
        f"{ATTENTION}.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        f"{MLP}.gate_up_proj": ("gate_proj", "up_proj"),
    }.items():
        names = [f"{fused.rpartition('.')[0]}.{leaf}" for leaf in leaves]
        for rank in range(ranks):
            parts = [share(name, whole[name], rank, ranks) for name in names]
            assert torch.equal(found[f"rank{rank}.{fused}"], torch.cat(parts))
            loaded = load(tmp_path / "cuda-out", "cpu", rank)[fused]
            biases = [
                share(name, before[f"{name}.bias"].unsqueeze(1), rank, ranks) for name in names
            ]
            assert torch.equal(loaded.bias, torch.cat(biases).squeeze(1))


def test_the_products_of_the_ranks_are_the_wholes(tmp_path: Path) -> None:
    """Joined where rows are cut, summed where columns are, the bias added by the first rank."""
    source = written(tmp_path, biased=True)
    ctconvert.repack(source, tmp_path / "whole", target="triton", device="cpu")
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu", tensor_parallel=2)
    whole = load(tmp_path / "whole", "cpu")
    ranks = [load(tmp_path / "out", "cpu", rank) for rank in range(2)]
    assert all(rank.keys() == whole.keys() for rank in ranks)
    for name, module_ in whole.items():
        x = torch.randn(3, SHAPES[name][1], dtype=torch.float16) * 0.1
        if name.endswith(("o_proj", "down_proj")):
            parts = [rank[name](some) for rank, some in zip(ranks, x.chunk(2, 1), strict=True)]
            made = parts[0].float() + parts[1].float()
        else:
            made = torch.cat([rank[name](x) for rank in ranks], 1).float()
        torch.testing.assert_close(made, module_(x).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_by_their_inner_size(fuse: bool, ranks: int, tmp_path: Path) -> None:
    """Of four ranks of 96 the tiles of gate and up are padded, each by itself."""
    tensors = expert_modules(MLP, INT4, (384, 256))
    source = write_checkpoint(tmp_path / "in", tensors, config_of(INT4))
    if not fuse:
        check(source, tmp_path, ranks)
        return
    convert_and_back(source, tmp_path, "cuda", tensor_parallel=ranks, fuse=True)
    ctconvert.repack(source, tmp_path / "whole", target="cuda", device="cpu")
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "cuda-out")
    assert len(found) == 2 * ranks
    for rank in range(ranks):
        for expert in range(3):

            def part(leaf: str, rank: int = rank, expert: int = expert) -> torch.Tensor:
                name = f"{MLP}.experts.{expert}.{leaf}"
                return share(name, whole[name], rank, ranks)

            both = torch.cat([part("gate_proj"), part("up_proj")])
            assert torch.equal(found[f"rank{rank}.{MLP}.experts.w13"][expert], both)
            assert torch.equal(found[f"rank{rank}.{MLP}.experts.w2"][expert], part("down_proj"))


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "stacked"])
def test_whole_experts(fuse: bool, tmp_path: Path) -> None:
    """Five experts of two ranks: the first has three, as vLLM places them."""
    tensors = expert_modules(MLP, INT4, (384, 256), 5)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(INT4))
    convert_and_back(source, tmp_path, "cuda", tensor_parallel=2, expert_parallel=True, fuse=fuse)
    ctconvert.repack(source, tmp_path / "whole", target="cuda", device="cpu", fuse=fuse)
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "cuda-out")
    if fuse:
        for name, stack in whole.items():
            assert torch.equal(found[f"rank0.{name}"], stack[:3])
            assert torch.equal(found[f"rank1.{name}"], stack[3:])
        return
    ranks = {name: int(name.split(".")[-2]) // 3 for name in whole}
    assert found.keys() == {f"rank{rank}.{name}" for name, rank in ranks.items()}
    assert all(torch.equal(found[f"rank{ranks[name]}.{name}"], w) for name, w in whole.items())


def test_experts_in_3_d_tensors(tmp_path: Path) -> None:
    """A joined gate and up is cut in each half; whole experts are not given away."""
    tensors = experts(f"{MLP}.experts.gate_up_proj", 384, 256, INT4)
    tensors |= experts(f"{MLP}.experts.down_proj", 256, 192, INT4)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(INT4))
    convert_and_back(source, tmp_path, "triton", tensor_parallel=2)
    ctconvert.repack(source, tmp_path / "whole", target="triton", device="cpu")
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "triton-out")
    gate, up = whole[f"{MLP}.experts.gate_up_proj"].chunk(2, 1)
    for rank in range(2):
        both = torch.cat([gate.chunk(2, 1)[rank], up.chunk(2, 1)[rank]], 1)
        assert torch.equal(found[f"rank{rank}.{MLP}.experts.gate_up_proj"], both)
    with pytest.raises(UnsupportedError, match="experts in 3-D tensors are not given to ranks"):
        ctconvert.repack(
            source, tmp_path / "no", target="triton", tensor_parallel=2, expert_parallel=True
        )
    assert not (tmp_path / "no").exists()


def test_vocabularies(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32), ["Linear", "Embedding"])
    names = ("model.embed_tokens", "lm_head")
    tensors = {
        name: tensor
        for seed, leaf in enumerate(names)
        for name, tensor in module(leaf, quantised(VOCABULARY, HIDDEN, group, seed)).items()
    }
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group, ignore=[]))
    check(source, tmp_path, 2, "triton")


def plan(folder: Path, shapes: dict[str, tuple[int, int]], ranks: int, **config: Any) -> Any:
    tensors = {
        name: tensor
        for seed, (leaf, shape) in enumerate(shapes.items())
        for name, tensor in module(leaf, quantised(*shape, INT4, seed)).items()
    }
    source = write_checkpoint(folder / "in", tensors, config_of(INT4, ignore=[]), **config)
    return ctconvert.plan(source, target="triton", tensor_parallel=ranks)


@pytest.mark.parametrize(
    ("name", "shape", "ranks", "reason"),
    [
        (f"{MLP}.down_proj", (256, 96), 2, "48 columns a rank cut a scale group of 32"),
        (f"{MLP}.down_proj", (256, 96), 5, "K = 96 is no multiple of 5 ranks"),
        (f"{MLP}.up_proj", (40, 256), 3, "N = 40 is no multiple of 3 ranks"),
        (f"{MLP}.up_proj", (40, 256), 10, "4 rows a rank cut a word of 4-bit zero points"),
        ("lm_head", (96, 256), 2, "96 rows are no multiple of 64"),
        (f"{ATTENTION}.o_proj", (64, 384), 3, "8 attention heads are no multiple of 3 ranks"),
        (f"{ATTENTION}.k_proj", (96, 256), 3, "2 key and value heads cannot be shared out to 3"),
        (f"{ATTENTION}.v_proj", (96, 256), 4, "its 96 rows are not the 2 heads"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    name: str, shape: tuple[int, int], ranks: int, reason: str, tmp_path: Path
) -> None:
    (refusal,) = plan(tmp_path, {name: shape}, ranks, **MODEL).refusals
    assert refusal.module == name
    assert reason in refusal.reason


def test_what_nothing_is_known_of_is_whole(tmp_path: Path) -> None:
    shapes = {f"m.{number}.mixer_proj": (64, 256) for number in range(3)}
    shapes |= {"m.0.q_a_proj": (64, 256)}
    made = plan(tmp_path, shapes, 2)
    assert [item.rank for item in made.modules] == [None] * 4
    assert [note for note in made.notes if "ranks share" in note] == [
        "m.0.mixer_proj and 2 others of that name: nothing tells how ranks share it, so all have "
        "it whole"
    ]


def test_a_rank_is_loaded_by_its_number(tmp_path: Path) -> None:
    source = written(tmp_path)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu", tensor_parallel=2)
    for rank, message in ((None, "cut for 2 ranks; say which"), (2, "no rank 2 of 2")):
        with pytest.raises(UsageError, match=message):
            load(tmp_path / "out", "cpu", rank)
    ctconvert.repack(source, tmp_path / "whole", target="triton", device="cpu")
    with pytest.raises(UsageError, match="no rank 1 of 1"):
        load(tmp_path / "whole", "cpu", 1)


def test_restored_modules_are_the_sources(tmp_path: Path) -> None:
    source = written(tmp_path)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu", tensor_parallel=2)
    assert ctconvert.restore(tmp_path / "out", tmp_path / "back").modules == len(SHAPES)


def test_options(tmp_path: Path) -> None:
    source = written(tmp_path)
    for options, message in (
        ({"tensor_parallel": 0}, "1 to 1024 ranks"),
        ({"tensor_parallel": 1025}, "1 to 1024 ranks"),
        ({"expert_parallel": True}, "expert_parallel=True needs .*: give tensor_parallel too"),
    ):
        with pytest.raises(UsageError, match=message):
            ctconvert.plan(source, target="triton", **options)  # type: ignore[arg-type]


def test_a_name_of_a_rank_in_the_source_is_refused(tmp_path: Path) -> None:
    tensors = module(f"{MLP}.up_proj", quantised(64, 256, INT4, 0))
    tensors[f"rank0.{MLP}.up_proj.qweight"] = torch.ones(1)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(INT4))
    with pytest.raises(BadInputError, match=r"two tensors of the output would be named rank0"):
        ctconvert.plan(source, target="triton", tensor_parallel=2)


def test_the_config_says_how_many_ranks(tmp_path: Path) -> None:
    source = written(tmp_path)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu", tensor_parallel=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["tensor_parallel"] == 2


@pytest.mark.parametrize("layout", ["marlin", "marlin-fp8", "scaled-mm", "humming-nvfp4"])
def test_no_more_is_read_than_a_ranks_rows(layout: str, tmp_path: Path) -> None:
    group = LAYOUT_GROUPS[layout][0]
    source = write_checkpoint(
        tmp_path / "in",
        module(f"{MLP}.up_proj", module_of(SIZE, HIDDEN, group, 0)),
        config_of(group),
    )
    made = ctconvert.plan(source, target="cuda", layout={"*": layout}, tensor_parallel=3)
    store = LocalStore(source)
    for item in made.modules:
        (few,) = item.sources
        read: list[int] = []

        def counting(entry: Any, read: list[int] = read) -> torch.Tensor:
            read.append(entry.nbytes)
            return read_tensor(store, entry)

        codec.encode(item, 0, counting, torch.device("cpu"))
        rest = sum(few.tensors[local].nbytes for local in few.values)
        assert 0 < sum(read) - rest == (few.nbytes - rest) // 3
        assert item.input_bytes == sum(read)


# --- manifests that say otherwise ----------------------------------------------------------------


def altered(manifest: Manifest, name: str, **changes: Any) -> bytes:
    """A manifest whose module ``name`` is changed, signed."""
    items = tuple(
        replace(item, **changes) if item.name == name else item for item in manifest.plan.items
    )
    return replace(manifest, plan=replace(manifest.plan, items=items)).dump()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    source = written(folder, biased=True)
    ctconvert.repack(source, folder / "out", target="triton", device="cpu", tensor_parallel=4)
    return folder / "out"


UP, KEYS = f"rank1.{MLP}.up_proj", f"rank1.{ATTENTION}.k_proj"
NOT_ALL = "do not hold all of it once"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (UP, {"rank": 4}, "it is of rank 4 of 4"),
        (UP, {"rank": 2}, "its name is none of rank 2"),
        (UP, {"rank": None}, "has other tensors beside the weight"),
        (UP, {"rows": (0, 192)}, NOT_ALL),
        (UP, {"rows": (160, 352)}, NOT_ALL),
        (UP, {"rows": (192, 768)}, "its assembly makes another weight"),
        (UP, {"rows": (672, 864)}, "N = 768 has no 672 to 864"),
        (UP, {"rows": (385, 577)}, "cut a word of 4-bit zero points"),
        (KEYS, {"rows": (32, 64)}, ""),
        (KEYS, {"rows": (16, 48)}, "cut a word|do not hold"),
        (f"rank1.{MLP}.down_proj", {"columns": (0, 192)}, NOT_ALL),
        (f"rank1.{MLP}.down_proj", {"columns": (176, 368)}, "cut a scale group of 32"),
    ],
)
def test_rectangles_that_do_not_tile_the_source_are_refused(
    four: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    manifest = Manifest.load(LocalStore(four))
    module_ = next(item for item in manifest.plan.modules if item.name == name)
    if "rank" not in changes:
        part = replace(module_.recipe.assembly, **changes)
        changes = {"recipe": replace(module_.recipe, assembly=part)}
    data = altered(manifest, name, **changes)
    if not message:
        Manifest.parse(data, "it")  # keys that another rank has as well: all is still there
        return
    with pytest.raises(VerificationError, match=message):
        Manifest.parse(data, "it")


def test_a_bias_that_no_rank_would_find_is_refused(four: Path) -> None:
    manifest = Manifest.load(LocalStore(four))
    module_ = next(item for item in manifest.plan.modules if item.name == UP)
    (source,) = module_.sources
    lost = {"bias": replace(source.beside["bias"], name="nowhere.bias")}
    data = altered(manifest, UP, sources=(replace(source, beside=lost),))
    with pytest.raises(VerificationError, match="a tensor beside the weight has no place"):
        Manifest.parse(data, "it")


def test_heads_that_differ_between_ranks_are_not_restored(four: Path, tmp_path: Path) -> None:
    with flip_bit(four, f"{KEYS}.scales", 0, 0):
        with pytest.raises(VerificationError, match="scale differs between the ranks that hold it"):
            ctconvert.restore(four, tmp_path / "back", device="cpu")
        with pytest.raises(VerificationError, match=f"{KEYS}: scale of .* differs from the source"):
            ctconvert.verify(four, against=four.parent / "in")
    assert not (tmp_path / "back").exists()


def test_a_manifest_too_large_to_be_read_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path)
    monkeypatch.setattr(build, "_MANY", 50)
    monkeypatch.setattr(build, "LARGEST_MANIFEST", 50_000)
    with pytest.raises(UsageError, match=r"manifest would have \d+ bytes.*or fewer ranks"):
        ctconvert.repack(source, tmp_path / "out", target="triton", tensor_parallel=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
