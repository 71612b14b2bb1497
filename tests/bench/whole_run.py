"""Whole repack processes beside a copy of the same files.

``python tests/bench/whole_run.py FOLDER [--gb 2] [--cases w4a16-triton,...] [--rounds 3]
[--device cpu] [--write] [--once]`` makes checkpoints of Llama-8B's shapes in FOLDER (and finds them
there the next time; no more with ``--write``), converts each once and checks the result, then takes
turns: ``cp -r MODEL COPY && sync``, ``repack --no-verify``, ``repack``, a process each, the source
in the page cache and the output's place empty. It prints medians, the source's bytes over them, and
the first conversion apart, in which a GPU's kernels may be compiled; for CPU seconds (user and
system) and page faults the least, which other work on the machine disturbs less. Peak memory is the
process's largest resident set, shared libraries included. With ``--once``, for many gigabytes, each
is run once, and the output is verified, loaded, cut for two ranks, and those are loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_experts import tiles
from bench_marlin import permutation
from printing import print_table
from safetensors import safe_open

#: N and K of a decoder layer of Llama-8B.
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
GROUP = 128
#: Bytes of a shard, about.
SHARD = 5 * 10**9
CHECKED = "model.layers.0.self_attn.k_proj"
#: FP8 weights, and activations that are quantised per token.
_FLOATS = {"strategy": "channel", "type": "float", "num_bits": 8, "symmetric": True}


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: its quantization_config, a module's tensors, and those after."""

    config: dict[str, object]
    make: Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]


def _w4a16(n: int, k: int, made: torch.Generator) -> dict[str, torch.Tensor]:
    codes = torch.randint(-(1 << 31), 1 << 31, (n, k // 8), generator=made, dtype=torch.int32)
    scale = (torch.rand((n, k // GROUP), generator=made) + 0.5).bfloat16()
    return {"weight_packed": codes, "weight_scale": scale, "weight_shape": torch.tensor([n, k])}


def _fp8(n: int, k: int, made: torch.Generator) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 0x78, (n, k), generator=made, dtype=torch.uint8)
    scale = (torch.rand((n, 1), generator=made) + 0.5).bfloat16()
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}


def _sparse(n: int, k: int, made: torch.Generator) -> dict[str, torch.Tensor]:
    kept = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8)  # two of four columns
    pick = torch.randint(0, 6, (2, n, k // 8), generator=made)
    values = torch.randint(1, 0x7F00, (n, k // 2), generator=made, dtype=torch.int16)
    return {
        "compressed": values.view(torch.bfloat16),
        "bitmask": kept[pick[0]] | kept[pick[1]] << 4,
        "shape": torch.tensor([[n], [k]]),
    }


_W4A16 = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": GROUP}
KINDS = {
    "w4a16": Kind(
        {
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _W4A16}},
        },
        _w4a16,
    ),
    "fp8": Kind(
        {
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": _FLOATS,
                    "input_activations": {**_FLOATS, "strategy": "token", "dynamic": True},
                }
            },
        },
        _fp8,
    ),
    "sparse24": Kind(
        {
            "format": "dense",
            "config_groups": {},
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "sparsity_structure": "2:4",
                "targets": ["Linear"],
                "ignore": [],
                "global_sparsity": 0.5,
                "registry_requires_subclass": False,
            },
        },
        _sparse,
    ),
}
DTYPES = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


def module_tensors(kind: str, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a decoder layer, one module at a time in memory."""
    made = torch.Generator().manual_seed(layer)
    for name, (n, k) in SHAPES.items():
        for local, tensor in KINDS[kind].make(n, k, made).items():
            yield f"model.layers.{layer}.{name}.{local}", tensor
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = torch.rand(4096, generator=made).bfloat16()
        yield f"model.layers.{layer}.{name}.weight", norm


def write(folder: Path, kind: str, size: int) -> None:
    """A checkpoint of ``size`` bytes or a little more, in shards; nothing where it is there."""
    if (folder / "config.json").exists():
        return
    one = list(module_tensors(kind, 0))
    per_layer = sum(tensor.nbytes for _, tensor in one)
    layers = range(-(-size // per_layer))
    folder.mkdir(parents=True, exist_ok=True)
    shards = _cut(layers, max(1, SHARD // per_layer))
    index: dict[str, str] = {}
    for number, inside in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(_write_shard(folder / file, kind, inside, one), file)
    if len(shards) == 1:
        (folder / file).rename(folder / "model.safetensors")
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    quantization = {"quant_method": "compressed-tensors", **KINDS[kind].config}
    text_of_it = json.dumps(config | {"quantization_config": quantization}, indent=1)
    (folder / "config.json").write_text(text_of_it)


def _cut(layers: range, count: int) -> list[range]:
    return [layers[first : first + count] for first in range(0, len(layers), count)]


def _write_shard(
    path: Path, kind: str, layers: Sequence[int], one: list[tuple[str, torch.Tensor]]
) -> list[str]:
    """Writes layers like ``one``, the first, several at once; returns their tensors' names."""
    header, position = {}, 0
    for layer in layers:
        for name, tensor in one:
            header[name.replace(".layers.0.", f".layers.{layer}.")] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begins = 8 + len(text)

    def fill(layer: int) -> None:
        with path.open("r+b") as part:
            part.seek(begins + (layer - layers[0]) * position // len(layers))
            for _, tensor in module_tensors(kind, layer):
                part.write(tensor.reshape(-1).view(torch.uint8).numpy())

    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(fill, layers))
    return list(header)


@dataclass(frozen=True)
class Case:
    kind: str
    target: str
    check: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], bool]


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    return ((words[:, :, None] >> torch.arange(0, 32, 4)) & 15).flatten(1)


def _is_n_packed(source: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> bool:
    codes = _nibbles(source["weight_packed"])
    return torch.equal(_nibbles(made["qweight"]), codes.t()) and torch.equal(
        made["scales"], source["weight_scale"].t()
    )


def _is_tiled(source: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> bool:
    return torch.equal(
        made["qweight"], tiles(source["weight_packed"], torch.tensor(permutation(4)))
    )


def _is_same(source: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> bool:
    left, right = (side["weight"].view(torch.uint8) for side in (source, made))
    return torch.equal(left, right)


def _keeps_values(source: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> bool:
    return torch.equal(made["weight"], source["compressed"])  # none of them is a zero


CASES = {
    "w4a16-triton": Case("w4a16", "triton", _is_n_packed),
    "w4a16-cuda": Case("w4a16", "cuda", _is_tiled),
    "fp8-triton": Case("fp8", "triton", _is_same),
    "sparse24-cuda": Case("sparse24", "cuda", _keeps_values),
}


def of_module(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one module of a checkpoint, by local name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for full in file.keys():  # noqa: SIM118 (no mapping)
                if full.startswith(name + "."):
                    found[full[len(name) + 1 :]] = file.get_tensor(full)
    return found


@dataclass(frozen=True)
class Cost:
    """What a process took; CPU seconds by user and system, memory in bytes."""

    seconds: float
    user: float
    system: float
    faults: int
    peak: int


#: Runs a command for :func:`cost`. A process begins with the peak of the one that started it, which
#: therefore is a small one.
_MEASURE = """
import json, os, subprocess, sys, time
begun = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
took = [time.perf_counter() - begun, used.ru_utime, used.ru_stime, used.ru_minflt]
print(json.dumps([*took, used.ru_maxrss << 10]))
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def cost(command: list[str]) -> Cost:
    """Runs a command that must succeed."""
    measure = [sys.executable, "-I", "-S", "-c", _MEASURE]
    done = subprocess.run([*measure, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return Cost(*json.loads(done.stdout))


def _row(case: str, what: str, found: list[Cost], copied: float, size: int) -> dict[str, object]:
    seconds = statistics.median(one.seconds for one in found)
    return {
        "case": case,
        "run": what,
        "s": f"{seconds:.2f}",
        "of a copy's": f"{seconds / copied:.2f}",
        "GB/s": f"{size / seconds / 1e9:.2f}",
        "CPU s": f"{min(one.user + one.system for one in found):.2f}",
        "of it system": f"{min(one.system for one in found):.2f}",
        "faults, 1000": min(one.faults for one in found) // 1000,
        "peak, MB": max(one.peak for one in found) // 10**6,
    }


#: Loads a rank of a converted checkpoint to a device, and prints the bytes and the seconds.
_LOAD = """
import sys, time
import torch
from ctconvert.runtime.loading import load
out, device, rank = sys.argv[1], torch.device(sys.argv[2]), sys.argv[3]
torch.empty(1, device=device)
begun = time.perf_counter()
found = load(out, str(device), rank=None if rank == "all" else int(rank))
if device.type != "cpu":
    torch.get_device_module(device).synchronize()
took = time.perf_counter() - begun
size = sum(t.nbytes for module in found.values() for t in module.tensors().values())
print(f"rank {rank} on {device}: {size / 1e9:.2f} GB in {took:.2f} s, {size / took / 1e9:.2f} GB/s")
"""


@dataclass(frozen=True)
class Run:
    """A case in a folder on a device."""

    name: str
    folder: Path
    gb: float
    device: str

    @property
    def model(self) -> Path:
        return self.folder / f"{CASES[self.name].kind}-{self.gb:g}"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def copy(self) -> list[str]:
        copy = self.folder / "copy"
        return ["sh", "-c", 'cp -r "$0" "$1" && sync', str(self.model), str(copy)]

    def repack(self, *options: str) -> list[str]:
        given = [str(self.model), str(self.out), "--target", CASES[self.name].target, *options]
        return [*PROGRAM, "repack", *given, "--device", self.device]

    def verify(self) -> list[str]:
        given = [str(self.out), "--against", str(self.model), "--device", self.device]
        return [*PROGRAM, "verify", *given]

    def clear(self) -> None:
        for name in ("out", "copy", "out.partial"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        os.sync()

    def cost(self, what: str, command: list[str]) -> Cost:
        found = cost(command)
        print(f"{self.name}, {what}: {found.seconds:.2f} s", file=sys.stderr)
        return found

    def check(self) -> None:
        """The output is right, by a module that is compared by other means too."""
        cost(self.verify())
        if not CASES[self.name].check(of_module(self.model, CHECKED), of_module(self.out, CHECKED)):
            raise SystemExit(f"{self.name}: {CHECKED} is not what it should be")

    def load(self, rank: str, device: str) -> None:
        subprocess.run([sys.executable, "-c", _LOAD, str(self.out), device, rank], check=True)

    def times(self, rounds: int) -> dict[str, list[Cost]]:
        """The first conversion, checked, then a copy and conversions in turn."""
        commands = {
            COPY: self.copy,
            "--no-verify": self.repack("--no-verify"),
            "verified": self.repack(),
        }
        self.clear()
        found = {"first, verified": [self.cost("first, verified", self.repack())]}
        self.check()
        for _ in range(rounds):
            for what, command in commands.items():
                self.clear()
                found.setdefault(what, []).append(self.cost(what, command))
        self.clear()
        return found

    def once(self) -> dict[str, list[Cost]]:
        """Everything once: copied, converted, verified, loaded, cut for two ranks, those loaded."""
        self.clear()
        found = {COPY: [self.cost(COPY, self.copy)]}
        self.clear()
        found["verified"] = [self.cost("verified", self.repack())]
        found["verify --against"] = [self.cost("verify --against", self.verify())]
        self.load("all", self.device)
        self.clear()
        ranks = "verified, 2 ranks"
        found[ranks] = [self.cost(ranks, self.repack("--tensor-parallel", "2"))]
        for rank in ("0", "1"):
            self.load(rank, self.device)
        self.clear()
        return found


COPY = "cp -r && sync"
PROGRAM = [sys.executable, "-m", "ctconvert"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="make the checkpoints, no more")
    parser.add_argument("--once", action="store_true", help="each once; loads and ranks too")
    given = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in given.cases.split(","):
        run = Run(name, given.folder, given.gb, given.device)
        write(run.model, CASES[name].kind, int(given.gb * 1e9))
        if given.write:
            continue
        found = run.once() if given.once else run.times(given.rounds)
        copied = statistics.median(one.seconds for one in found[COPY])
        size = sum(path.stat().st_size for path in run.model.glob("*.safetensors"))
        rows += [_row(name, what, costs, copied, size) for what, costs in found.items()]
    if given.write:
        return
    print(f"{given.gb:g} GB, {os.cpu_count()} CPU cores, {given.device}")
    print_table(rows)


if __name__ == "__main__":
    main()
