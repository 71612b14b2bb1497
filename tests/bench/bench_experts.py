"""A layer of experts converted and stacked, beside a plain torch loop.

``python tests/bench/bench_experts.py [--experts 384] [--size 2048] [--hidden 7168] [--folder F]``
writes int4 experts of random codes in groups of 32 as a source has them, one by one (9.5 GB as
Kimi-K2's layers are, without options), stacks them for Marlin with ``ctconvert repack --fuse`` in a
process of its own, and prints the time and the CPU time per expert, and the peak of that process's
private memory. The loop beside it unpacks, permutes, packs and stacks one expert after the other in
plain torch; it writes, hashes and checks nothing. Its first expert is compared with the output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import torch
from bench_marlin import permutation
from safetensors import safe_open

LEAVES = ("gate_proj", "up_proj", "down_proj")
GROUP = 32
NAME = "model.layers.0.mlp.experts.{}.{}.{}"


def write(folder: Path, experts: int, size: int, hidden: int) -> int:
    """A checkpoint in one file, an expert at a time in memory; returns its bytes."""
    header: dict[str, object] = {}
    position = 0
    for number in range(experts):
        for leaf in LEAVES:
            n, k = (hidden, size) if leaf == "down_proj" else (size, hidden)
            for local, dtype, shape, nbytes in (
                ("weight_packed", "I32", [n, k // 8], n * k // 2),
                ("weight_scale", "BF16", [n, k // GROUP], n * k // GROUP * 2),
                ("weight_shape", "I64", [2], 16),
            ):
                offsets = [position, position + nbytes]
                header[NAME.format(number, leaf, local)] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": offsets,
                }
                position += nbytes
    text = json.dumps(header).encode()
    made = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(experts):
            for leaf in LEAVES:
                _module(file, *((hidden, size) if leaf == "down_proj" else (size, hidden)), made)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights | {"group_size": GROUP}}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return position


def _module(file: IO[bytes], n: int, k: int, made: torch.Generator) -> None:
    codes = torch.randint(-(1 << 31), 1 << 31, (n, k // 8), generator=made, dtype=torch.int32)
    scale = (torch.rand((n, k // GROUP), generator=made) + 0.5).bfloat16()
    file.write(codes.numpy())
    file.write(scale.view(torch.int16).numpy())
    file.write(torch.tensor([n, k]).numpy())


def repack(source: Path, out: Path) -> tuple[float, float, int]:
    """Seconds, CPU seconds, and the peak of private memory in bytes."""
    arguments = [sys.executable, "-m", "ctconvert", "repack", str(source), str(out)]
    arguments += ["--target", "cuda", "--fuse", "--device", "cpu", "--no-verify"]
    begun = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.005)
    if process.wait():
        raise SystemExit("repack failed")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime, peak


def tiles(words: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """K-packed i32 [N, K/8] to Marlin's i32 [K/16, 2N], as plain torch does it."""
    n = words.shape[0]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = ((words[:, :, None] >> shifts) & 15).flatten(1).t()
    tiled = codes.reshape(-1, 16, n // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
    eights = tiled[:, order].reshape(-1, 2 * n, 8)
    packed = torch.zeros(eights.shape[:2], dtype=torch.int32)
    for place in range(8):
        packed |= eights[:, :, place] << 4 * place
    return packed


def loop(source: Path, count: int, out: Path) -> tuple[float, float]:
    """Seconds and CPU seconds per expert of the plain loop."""
    order = torch.tensor(permutation(4))
    grouped = torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
    seconds = used = 0.0
    with (
        safe_open(source / "model.safetensors", "pt") as before,
        safe_open(out / "model.safetensors", "pt") as after,
    ):
        for number in range(count):
            begun, before_it = time.perf_counter(), time.process_time()
            read = {
                (leaf, local): before.get_tensor(NAME.format(number, leaf, local))
                for leaf in LEAVES
                for local in ("weight_packed", "weight_scale")
            }
            made = {}
            for stack, leaves in (("w13", LEAVES[:2]), ("w2", LEAVES[2:])):
                words = torch.cat([read[leaf, "weight_packed"] for leaf in leaves])
                scale = torch.cat([read[leaf, "weight_scale"] for leaf in leaves]).t()
                made[f"{stack}_qweight"] = tiles(words, order)
                made[f"{stack}_scales"] = scale.reshape(-1, 64)[:, grouped].reshape(scale.shape)
            seconds += time.perf_counter() - begun
            used += time.process_time() - before_it
            for name, tensor in made.items() if number == 0 else ():
                found = after.get_slice(f"model.layers.0.mlp.experts.{name}")[0]
                if not torch.equal(found, tensor):
                    raise SystemExit(f"{name} is not what the plain loop makes")
    return seconds / count, used / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--folder", default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        source, out = Path(name) / "model", Path(name) / "out"
        source.mkdir()
        total = write(source, given.experts, given.size, given.hidden)
        seconds, used, peak = repack(source, out)
        plain = loop(source, min(given.experts, 8), out)
    expert = total / given.experts
    each = [1e3 * value for value in (seconds / given.experts, used / given.experts, *plain)]
    print(
        f"{given.experts} experts of {given.size} x {given.hidden}, {total / 1e9:.2f} GB, "
        f"{os.cpu_count()} CPU cores: {each[0]:.1f} ms an expert, {each[1]:.1f} of CPU time (a "
        f"plain torch loop: {each[2]:.1f} and {each[3]:.1f}), {seconds:.1f} s in all; peak memory "
        f"{peak / 1e6:.0f} MB, an expert being {expert / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
