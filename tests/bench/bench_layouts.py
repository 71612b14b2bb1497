"""Every layout there and back: what its ``encode`` and ``decode`` take, beside a device copy.

``python tests/bench/bench_layouts.py [cpu|cuda|xpu] [N] [K]``. Bytes are those of the weight and of
the layout's tensors together, over the best of some calls; on a CPU of the time of one thread, so
that neighbours of a shared machine count less. The way back is first compared with the weight; a
difference ends the run. A layout without a weight in :func:`weights` ends it too.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from msgspec.structs import replace

from ctconvert.layouts import LAYOUTS
from ctconvert.specs import QuantizedWeight, WeightSpec
from ctconvert.transforms.device import synchronize
from ctconvert.transforms.dtypes import same_bits
from ctconvert.transforms.sparse24 import pairs_of_sm90, sm90_compress

FP8 = {"format": "bench", "kind": "float", "bits": 8, "storage": "plain", "element": "F8_E4M3"}
INT = {"format": "bench", "kind": "int", "storage": "packed"}


def scales(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.rand(shape) * 0.02 + 0.001).to(dtype)


def codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (n, k * bits // 32), dtype=torch.int32)


def e4m3(n: int, k: int) -> torch.Tensor:
    """Every finite value that is not negative, subnormals among them."""
    return torch.randint(0, 0x7F, (n, k), dtype=torch.uint8).view(torch.float8_e4m3fn)


def integers(n: int, k: int, bits: int, group: int | None, **more: Any) -> QuantizedWeight:
    shape = (n, k // group if group else 1)
    spec = WeightSpec(
        **INT
        | {"family": "wna16", "bits": bits, "n": n, "k": k, "group_size": group}
        | {"strategy": "group" if group else "channel", "scale_dtype": "BF16"}
        | {"scale_shape": shape}
        | more
    )
    zero = None if spec.symmetric else torch.randint(0, 1 << bits, shape).to(torch.uint8)
    return QuantizedWeight(spec, codes(n, k, bits), scales(shape), zero)


def floats(n: int, k: int, **more: Any) -> QuantizedWeight:
    spec = WeightSpec(
        **FP8
        | {"family": "w8a8", "n": n, "k": k, "strategy": "channel", "scale_dtype": "BF16"}
        | {"scale_shape": (n, 1)}
        | more
    )
    assert spec.scale_shape is not None
    return QuantizedWeight(spec, e4m3(n, k), scales(spec.scale_shape))


def micro(n: int, k: int, family: str, activations: str | None) -> QuantizedWeight:
    """NVFP4, MXFP4 and MXFP8."""
    bits, group = (8, 32) if family == "mxfp8" else (4, 16 if family == "nvfp4" else 32)
    shape, scale_dtype = (n, k // group), "F8_E4M3" if family == "nvfp4" else "U8"
    kind = FP8 if bits == 8 else INT | {"kind": "float", "bits": 4}
    names = ("weight_global_scale", "input_global_scale") if family == "nvfp4" else ()
    spec = WeightSpec(
        **kind
        | {"family": family, "n": n, "k": k, "strategy": "group", "group_size": group}
        | {"scale_dtype": scale_dtype, "scale_shape": shape, "activations": activations}
        | {"input_type": "float4" if activations else None}
        | {"side": tuple((name, "F32") for name in names)}
    )
    scale = e4m3(*shape) if family == "nvfp4" else torch.randint(0, 255, shape, dtype=torch.uint8)
    values = e4m3(n, k) if bits == 8 else codes(n, k, 4)
    side = {name: torch.tensor([100.0]) for name in names}
    return QuantizedWeight(spec, values, scale, side=side)


def weights(n: int, k: int) -> Iterator[tuple[str, QuantizedWeight]]:
    """Layouts and what each is timed with."""
    int8 = {"family": "w8a8", "storage": "plain", "element": "I8", "input_type": "I8"}
    for name in ("triton-wna16", "marlin", "machete", "humming", "cpu-w4a16", "cpu-w4a8"):
        yield name, integers(n, k, 4, 128, symmetric=name == "humming")
    for name in ("xpu-w4a16", "gather"):
        more = {"family": "embedding", "embedding": True} if name == "gather" else {}
        yield name, integers(n, k, 4, 128, **more)
    yield "xpu-w4a8", integers(n, k, 4, 128, family="w4a8")
    fp8_activations = {"activations": "fp8 dynamic token in", "input_type": "F8_E4M3"}
    yield "w4a8-fp8", integers(n, k, 4, 128, family="other", **fp8_activations)
    for name, activations in (("scaled-mm", "int8 asym dynamic token in"), ("cpu-int8", None)):
        weight = integers(n, k, 8, None, activations=activations, **int8)
        weight.codes = weight.codes.view(torch.int8)
        yield name, weight
    blocks = {"strategy": "block", "block": (128, 128), "scale_shape": (-(-n // 128), -(-k // 128))}
    yield "marlin-fp8", floats(n, k, **blocks)
    yield "marlin-fp8-f16", floats(n, k)
    for name in ("marlin-nvfp4", "marlin-nvfp4-f16", "humming-nvfp4", "nvfp4-cutlass"):
        yield name, micro(n, k, "nvfp4", "fp4 local tensor_group in")
    yield "marlin-mxfp4", micro(n, k, "mxfp4", None)
    yield "mxfp4-swizzled", micro(n, k, "mxfp4", "fp4 dynamic group in")
    yield "marlin-mxfp8", micro(n, k, "mxfp8", None)
    yield "mxfp8-swizzled", micro(n, k, "mxfp8", "fp8 dynamic group in")
    sparse = {"family": "sparse24", "sparse": True, "strategy": "channel", "input_type": "F8_E4M3"}
    weight = floats(n, k, **sparse)
    weight.codes.view(torch.uint8).view(-1, 4)[:, ::2] = 0
    values, meta = sm90_compress(weight.codes)
    weight.codes, weight.pairs = pairs_of_sm90(values, meta, n, k)
    yield "cutlass-sparse24", weight


_PARTS = ("codes", "pairs", "scale", "zero_point", "g_idx")


def moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    found = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
    known = {name: found.pop(name, None) for name in _PARTS}
    assert known["codes"] is not None
    return QuantizedWeight(weight.spec, **known, side=found)


def best(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds. On a GPU the L2 cache is cleared before each call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e3 * float(do_bench(call, return_mode="median"))
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(7):
        synchronize(device)
        start = clock()
        call()
        synchronize(device)
        times.append(clock() - start)
    return 1e6 * min(times)


@functools.cache
def copied(size: int, device: torch.device) -> float:
    """Microseconds of a copy that moves ``size`` bytes."""
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    return best(source.clone, device)


def measure(device: torch.device, n: int = 4096, k: int = 8192) -> list[dict[str, Any]]:
    """Two rows for each layout.

    Raises:
        AssertionError: a way back is wrong, or a layout is not timed.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    rows: list[dict[str, Any]] = []
    for name, found in weights(n, k):
        layout, weight = known.pop(name), moved(found, device)
        assert layout.supports(weight.spec), (name, layout.supports(weight.spec).reason)
        assert layout.padded_shape(weight.spec) == (n, k), name
        made = layout.encode(weight)
        back, want = layout.decode(made, weight.spec).tensors(), weight.tensors()
        assert back.keys() == want.keys(), name
        assert all(same_bits(back[part], want[part]) for part in want), name
        size = sum(tensor.nbytes for tensor in (*want.values(), *made.values()))
        ways: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("encode", lambda layout=layout, weight=weight: layout.encode(weight)),
            ("decode", lambda layout=layout, made=made, w=weight: layout.decode(made, w.spec)),
        )
        for way, call in ways:
            us, copy_us = max(best(call, device), 1.0), copied(size, device)
            rows.append(
                {
                    "name": f"{name} {way}",
                    "shape": (n, k),
                    "dtype": replace(weight.spec, activations=None).label,
                    "us": us,
                    "tb_s": size / us / 1e6,
                    "copy_tb_s": size / copy_us / 1e6,
                    "share": copy_us / us,
                }
            )
    assert not known, f"not timed: {', '.join(known)}"
    return rows


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    n, k = (int(value) for value in sys.argv[2:4]) if len(sys.argv) > 3 else (4096, 8192)
    if device.type == "cpu":
        torch.set_num_threads(1)
    for row in measure(device, n, k):
        print(
            f"{row['name']:<26}{row['dtype']:<18}{row['us']:>10.0f} us"
            f"{row['tb_s'] * 1e3:>9.2f} GB/s{row['share']:>8.0%} of a copy"
        )


if __name__ == "__main__":
    main()
