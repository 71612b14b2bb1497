"""On a GPU: whole conversions give the CPU's bytes, and the transforms the real libraries'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.paths import CHECKPOINTS, GOLDEN
from support.schemes import REAL

import ctconvert

pytestmark = pytest.mark.gpu
CASES = [
    (name, target) for name, targets in REAL.items() for target, made in targets.items() if made
]


@pytest.mark.parametrize(("name", "target"), CASES)
@pytest.mark.parametrize("fuse", [False, True])
def test_the_gpu_writes_the_cpus_bytes(name: str, target: str, fuse: bool, tmp_path: Path) -> None:
    source = CHECKPOINTS / name
    for device in ("cpu", "cuda"):
        # one name for both: a restored checkpoint's manifest says what it was made of
        out = tmp_path / device / "out"
        ctconvert.repack(source, out, target=target, device=device, fuse=fuse)
        ctconvert.restore(out, tmp_path / device / "back", device=device)
    for folder in ("out", "back"):
        made, want = (tmp_path / device / folder for device in ("cuda", "cpu"))
        names = {path.name for path in want.iterdir()}
        assert names == {path.name for path in made.iterdir()}
        for file in names:
            assert (made / file).read_bytes() == (want / file).read_bytes(), file


@pytest.mark.parametrize("key", ["w4.K128.N64", "w4.K256.N128", "w8.K128.N64", "w8.K256.N128"])
def test_marlin_vectors(key: str) -> None:
    from ctconvert.transforms.marlin import marlin_pack, marlin_unpack

    vectors = load_file(GOLDEN / "marlin_repack.safetensors")
    words = vectors[f"marlin_repack.{key}.in"].t().contiguous()
    bits, tiles = int(key[1]), vectors[f"marlin_repack.{key}.out"]
    n, k = words.shape[0], words.shape[1] * 32 // bits
    assert torch.equal(marlin_pack(words.cuda(), bits).cpu(), tiles)
    assert torch.equal(marlin_unpack(tiles.cuda(), bits, n, k).cpu(), words)


def test_mxfp4_vectors() -> None:
    from ctconvert.transforms.marlin import marlin_pack, marlin_permute_mxfp4_scales

    vectors = load_file(GOLDEN / "marlin_mxfp4.safetensors", device="cuda")
    words = vectors["mxfp4_marlin.weight_packed"].view(torch.int32)
    assert torch.equal(marlin_pack(words, 4), vectors["mxfp4_marlin.out_weight"])
    scales = vectors["mxfp4_marlin.weight_scale"].t().contiguous()
    made = marlin_permute_mxfp4_scales(scales)
    assert torch.equal(made, vectors["mxfp4_marlin.out_scale_u8"])


def test_cutlass_vectors() -> None:
    from ctconvert.transforms.sparse24 import sm90_compress, sm90_decompress

    vectors = load_file(GOLDEN / "cutlass_sparse24.safetensors", device="cuda")
    names = [key.removesuffix(".dense") for key in vectors if key.endswith(".dense")]
    assert len(names) == 24
    for name in names:
        dense = vectors[f"{name}.dense"]
        values, meta = sm90_compress(dense)
        assert torch.equal(values.view(torch.uint8), vectors[f"{name}.nzs"].view(torch.uint8)), name
        assert torch.equal(meta, vectors[f"{name}.meta"]), name
        back = sm90_decompress(values, meta, *dense.shape)
        assert torch.equal(back.float(), dense.float()), name
