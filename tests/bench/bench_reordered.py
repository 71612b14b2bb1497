"""Machete, W4A8-FP8, Humming and CPU transforms: throughput of each way, checked by the inverse.

``python tests/bench/bench_reordered.py [cpu|cuda|xpu] [N] [K]`` prints GB/s of input and output
together, the best of some calls; on the CPU of the time of one thread, so that neighbours of a
shared machine count less. ``clone`` is a copy of the same bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from ctconvert.transforms import cpu, humming, machete, w4a8_fp8
from ctconvert.transforms.device import synchronize

Pair = tuple[str, torch.Tensor, Callable[[torch.Tensor], torch.Tensor], Callable]


def pairs(n: int, k: int, device: torch.device) -> list[Pair]:
    def words(bits: int) -> torch.Tensor:
        shape = (n, k * bits // 32)
        return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32).to(device)

    zeros = torch.randint(0, 16, (n, k // 128)).to(torch.uint8).to(device)
    bf16 = torch.bfloat16
    found: list[Pair] = [("clone, 4 bits", words(4), torch.clone, torch.clone)]
    for bits in (4, 8):
        found += [
            (
                f"machete, {bits} bits",
                words(bits),
                lambda w, bits=bits: machete.machete_pack(w, bits),
                lambda t, bits=bits: machete.machete_unpack(t, bits, n, k),
            ),
            (
                f"humming, {bits} bits",
                words(bits),
                lambda w, bits=bits: humming.humming_pack(w, bits, bf16),
                lambda t, bits=bits: humming.humming_unpack(t, bits, n, k, bf16),
            ),
        ]
    found += [
        (
            "w4a8-fp8",
            words(4),
            w4a8_fp8.w4a8_fp8_pack,
            lambda t: w4a8_fp8.w4a8_fp8_unpack(t, n, k),
        ),
        ("cpu-w4a16", words(4), cpu.cpu_w4a16_pack, lambda t: cpu.cpu_w4a16_unpack(t, n, k)),
        (
            "cpu-w4a8",
            words(4),
            lambda w: cpu.cpu_w4a8_pack(w, zeros),
            lambda t: cpu.cpu_w4a8_unpack(t, zeros, n, k),
        ),
        (
            "cpu-int8",
            words(8).view(torch.int8),
            cpu.cpu_int8_pack,
            lambda t: cpu.cpu_int8_unpack(t, n, k),
        ),
    ]
    return found


def best(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(15):
        synchronize(device)
        start = clock()
        run()
        synchronize(device)
        times.append(clock() - start)
    return min(times)


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    n, k = (int(value) for value in sys.argv[2:4]) if len(sys.argv) > 3 else (4096, 4096)
    torch.set_num_threads(1)
    print(f"{'N x K = ' + f'{n} x {k}':24}{'there':>8}{'back':>8}  GB/s")
    for name, source, there, back in pairs(n, k, device):
        made = there(source)
        if not torch.equal(back(made), source):
            raise SystemExit(f"{name}: the inverse does not give the source")
        both = (source.nbytes + made.nbytes) / 1e9
        forth = both / best(lambda there=there, source=source: there(source), device)
        again = both / best(lambda back=back, made=made: back(made), device)
        print(f"{name:24}{forth:8.2f}{again:8.2f}")


if __name__ == "__main__":
    main()
