"""Tiles of the INT4 kernels (G = 128, bf16): what is chosen today beside the best found.

    python tests/bench/tune_mm.py FOUND.jsonl --seconds 420

Every kernel is compiled ahead, in parallel, into Triton's cache. For each shape and M each
candidate is checked against float64 on a sample of the result, timed for 3 ms, the best eight for
20 and the best three for 100, beside what is chosen today and cuBLAS, as ``median_seconds`` does:
a CUDA graph, a cold L2 cache. Every figure is a line of FOUND.jsonl at once; a run again takes up
where one stopped. A process that a candidate kills is started again without it.

The choice lives in ``select`` of ``ctconvert/runtime/kernels/wna16/triton.py`` and of
``marlin/fragments.py`` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from printing import print_table

from ctconvert.runtime.benchmark import median_seconds
from ctconvert.runtime.kernels.marlin import fragments
from ctconvert.runtime.kernels.marlin import triton as marlin
from ctconvert.runtime.kernels.marlin.fragments import Fragments
from ctconvert.runtime.kernels.marlin.reference import tiles_dequantize
from ctconvert.runtime.kernels.wna16 import triton as wna16
from ctconvert.runtime.kernels.wna16.reference import dequantize_wna16
from ctconvert.runtime.kernels.wna16.triton import FEWEST_ROWS, Tiles

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192))  # K, N
TOKENS = (64, 256, 16, 1024, 128, 512, 1)  # what is furthest from the others' kernels first
GROUP = 128
KERNELS = ("wna16", "marlin")
Dense = (wna16.Dense, marlin.Dense)
BYTES, FLOPS = 4.3e12, 790e12  # a second, of an H200
TOLERANCE = 5e-3


def candidates(kernel: str, m: int) -> list[Any]:
    """Tiles worth trying for M rows; what does not fit in shared memory is dropped when met."""
    fragment = kernel == "marlin"
    found: list[Any] = []

    def add(
        rows: int,
        shapes: tuple[tuple[int, int, int], ...],  # blocks, block_k, warps
        stages: tuple[int, ...],
        programs: tuple[int, ...],
        sums: bool,
        overlaps: tuple[bool, ...] = (False,),
    ) -> None:
        for (blocks, k, warps), stage, each, overlap in product(shapes, stages, programs, overlaps):
            if fragment:
                found.append(Fragments(rows, blocks, k, warps, stage, each, sums, overlap))
            else:
                found.append(Tiles(rows, blocks, k, 1, warps, stage, each, sums, overlap))

    if m <= 16:
        rows = FEWEST_ROWS if m <= 8 else 16
        shapes = [(2, 128, 4), (4, 128, 4), (4, 128, 8), (4, 64, 4)]
        shapes += [(1, 128, 4), (2, 128, 8)] if fragment else []
        add(rows, tuple(shapes), (3, 4, 5), (1, 2, 3, 4), True)
        if m > 8:
            add(rows, ((2, 128, 4), (4, 128, 8)), (3, 4), (1, 2, 3), False, (True,))
        return found
    shapes = [(2, 128, 4), (2, 64, 4), (4, 128, 8), (4, 64, 8)]
    shapes += [(1, 128, 4), (2, 128, 8)] if fragment else []
    if m <= 128:
        add(64, tuple(shapes), (3, 4), (0, 1, 2, 3), False, (False, True))
    else:
        add(64, tuple(shapes), (3, 4), (0, 1, 2), False, (True,))
    if m > 64:
        shapes = [(2, 64, 4), (4, 64, 8), (4, 128, 8)] + ([(2, 128, 8)] if fragment else [])
        add(128, tuple(shapes), (3, 4), (0, 1, 2), False, (False, True))
        if not fragment:  # two pieces a step, as is chosen today
            found += [Tiles(128, 4, 64, 2, 8, s, p, False) for s, p in product((3, 4), (0, 1))]
    if m > 128:
        if fragment:  # a block of 64 columns a warp group
            add(256, ((2, 64, 8), (2, 128, 8)), (3, 4), (0, 1), False, (False, True))
        found.append(marlin.Dense() if fragment else wna16.Dense())
    return found


def compiled(kernel: str, config: Any, split: bool) -> tuple[Any, ...]:
    """What a candidate is compiled for: candidates that differ in ``programs`` share it."""
    return (kernel, repr(config).split("programs")[0], repr(config).split("scale_sum")[-1], split)


class Problem:
    """Random arguments of both kernels for one shape, and float64 columns of the weight."""

    def __init__(self, kernel: str, k: int, n: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(k + n)
        marlin_tiles = kernel == "marlin"
        words = (k // 16, n * 2) if marlin_tiles else (k, n // 8)
        self.kernel, self.k, self.n, self.device = kernel, k, n, device
        self.generator = generator
        self.qweight = torch.randint(
            -(2**31), 2**31 - 1, words, dtype=torch.int32, device=device, generator=generator
        )
        scales = torch.rand(k // GROUP, n, device=device, generator=generator) / 100 + 0.005
        self.scales = scales.bfloat16()
        self.columns = torch.cat([torch.arange(0, n, 37), torch.tensor([n - 1])]).to(device)

    def dense(self) -> torch.Tensor:
        """f32 [K, N], in Marlin's case a view."""
        if self.kernel == "marlin":
            shape = {"form": "int4", "n": self.n, "k": self.k, "group_size": GROUP}
            return tiles_dequantize(self.qweight, self.scales, **shape).t()  # type: ignore[arg-type]
        return dequantize_wna16(self.qweight, self.scales, bits=4, group_size=GROUP)

    def x(self, m: int) -> torch.Tensor:
        shape = (m, self.k)
        return torch.randn(shape, device=self.device, generator=self.generator).bfloat16()

    def run(self, x: torch.Tensor, config: Any) -> torch.Tensor:
        arguments = (x, self.qweight, self.scales)
        if self.kernel == "marlin":
            shape = {"n": self.n, "k": self.k, "group_size": GROUP, "bits": 4}
            return marlin.gemm(*arguments, **shape, config=config)
        return wna16.gemm(*arguments, bits=4, group_size=GROUP, config=config)


class _OnlyCompiled:
    """Stands for a Triton kernel and compiles it where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return partial(self.kernel.run, grid=grid, warmup=True)


_PROBLEMS: dict[tuple[str, int, int], Problem] = {}


def compile_one(kernel: str, config: Any, k: int, n: int, m: int) -> str:
    """In a process of its own: an error's text, or nothing."""
    for module, name in ((wna16, "_gemm_kernel"), (fragments, "_fragments_kernel")):
        held = getattr(module, name)
        if not isinstance(held, _OnlyCompiled):
            setattr(module, name, _OnlyCompiled(held))
    key = (kernel, k, n)
    if key not in _PROBLEMS:
        _PROBLEMS[key] = Problem(*key, torch.device("cuda"))
    try:
        _PROBLEMS[key].run(_PROBLEMS[key].x(m), config)
    except Exception as error:  # noqa: BLE001 - Triton's have no base of their own
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def is_split(config: Any, k: int, n: int, m: int, sms: int) -> bool:
    """Whether a program of the kernel takes part of a tile, which is compiled apart."""
    block_n = 64 * config.blocks
    tiles = -(-n // block_n) * -(-m // config.block_m)
    steps = -(-k // (config.block_k * getattr(config, "pieces", 1)))
    return wna16.steps_a_program(tiles, steps, config.programs * sms) % steps != 0


def points() -> Iterator[tuple[int, int, int]]:
    for m, (k, n) in product(TOKENS, SHAPES):
        yield k, n, m


def compile_all(kernels: tuple[str, ...], workers: int, seconds: float, out: Path) -> None:
    """Fills Triton's cache with every kernel of every candidate."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    tasks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for (k, n, m), kernel in product(points(), kernels):
        for config in candidates(kernel, m):
            if hasattr(config, "blocks"):
                key = compiled(kernel, config, is_split(config, k, n, m, sms))
                tasks.setdefault(key, (kernel, config, k, n, m))
    begun = time.monotonic()
    failed = 0
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, *task): task for task in tasks.values()}
        try:
            for future in as_completed(futures, timeout=seconds):
                if problem := future.result():
                    failed += 1
                    kernel, config, k, n, m = futures[future]
                    write(
                        out, kernel=kernel, config=repr(config), k=k, n=n, m=m, uncompiled=problem
                    )
                    if failed == 1:
                        print(problem, flush=True)
        except BrokenProcessPool as error:  # a compiler that aborts takes its process along
            print(f"compiling ahead stopped: {error}", flush=True)
        except TimeoutError:
            print(f"compiling stopped after {seconds:.0f} s; the rest compiles when it is met")
            pool.shutdown(wait=False, cancel_futures=True)
    print(
        f"{len(tasks)} kernels compiled in {time.monotonic() - begun:.0f} s, {failed} not",
        flush=True,
    )


def write(out: Path, **line: Any) -> None:
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def measure(kernel: str, deadline: float, out: Path, device: torch.device) -> None:
    """All points of one kernel that FOUND.jsonl does not have, until the deadline.

    Raises:
        AssertionError: what is chosen today is wrong.
    """
    lines = [line for line in read(out) if line["kernel"] == kernel]
    done = {(line["k"], line["n"], line["m"]) for line in lines if "best" in line}
    # What was tried and has no figure is what ended the process before.
    bad = {line["config"] for line in lines if "failed" in line}
    if lines and "trying" in lines[-1]:
        bad.add(lines[-1]["config"])
        write(out, kernel=kernel, config=lines[-1]["config"], failed="ended the process")
    held: dict[tuple[int, int], tuple[Problem, torch.Tensor, torch.Tensor]] = {}
    for k, n, m in points():
        if (k, n, m) in done or time.time() > deadline:
            continue
        if (k, n) not in held:
            problem = Problem(kernel, k, n, device)
            weight = problem.dense()
            sample = weight[:, problem.columns].double()
            held[k, n] = problem, weight.bfloat16().contiguous(), sample
        problem, dense, sample = held[k, n]
        wna16.COUNTERS._reserves.clear()  # every captured launch takes some
        x = problem.x(m)
        rows = torch.unique(torch.linspace(0, m - 1, min(m, 64), device=device).round().long())
        wanted = x[rows].double() @ sample
        at = {"kernel": kernel, "k": k, "n": n, "m": m}

        def error_of(config: Any) -> float:
            got = problem.run(x, config)  # noqa: B023 - called before the next point
            if not bool(got.isfinite().all()):
                return float("inf")
            part = got[rows][:, problem.columns].double()  # noqa: B023
            return float((part - wanted).norm() / wanted.norm())  # noqa: B023

        error = error_of(None)
        assert error < TOLERANCE, f"{kernel} {k} x {n} x {m}: error {error:.1e} today"
        times: dict[Any, float] = {}
        for config in candidates(kernel, m):
            if repr(config) in bad or time.time() > deadline:
                continue
            write(out, **at, config=repr(config), trying=True)
            try:
                error = error_of(config)
                seconds = median_seconds(partial(problem.run, x, config), device, milliseconds=3)
            except Exception as failure:
                text = f"{type(failure).__name__}: {failure}"[:300]
                write(out, **at, config=repr(config), failed=text)
                if "CUDA error" in str(failure) or "illegal" in str(failure):
                    raise  # nothing can be launched any more
                bad.add(repr(config))
                continue
            if not error < TOLERANCE:
                write(out, **at, config=repr(config), wrong=error, us=seconds * 1e6)
                print(f"WRONG {kernel} {k} x {n} x {m} {config}: {error:.1e}", flush=True)
                continue
            times[config] = seconds
            write(out, **at, config=repr(config), us=seconds * 1e6, error=error)
        for keep, milliseconds in ((8, 20), (3, 100)):
            times = {
                config: median_seconds(
                    partial(problem.run, x, config), device, milliseconds=milliseconds
                )
                for config in sorted(times, key=times.__getitem__)[:keep]
            }
        present = median_seconds(partial(problem.run, x, None), device)
        cublas = median_seconds(partial(torch.mm, x, dense), device)
        best = min(times, key=times.__getitem__) if times else None
        moved = n * k // 2 + 2 * n * k // GROUP + 2 * m * (k + n)
        floor = max(moved / BYTES, 2 * m * n * k / FLOPS)
        write(
            out,
            **at,
            best=repr(best),
            best_us=times[best] * 1e6 if best is not None else None,
            present_us=present * 1e6,
            cublas_us=cublas * 1e6,
            floor_us=floor * 1e6,
            next=[[repr(config), seconds * 1e6] for config, seconds in times.items()],
        )


def report(out: Path) -> None:
    rows = []
    for line in read(out):
        if "best" in line and line["best_us"] is not None:
            us = {key: line[f"{key}_us"] for key in ("present", "best", "cublas", "floor")}
            rows.append(
                {
                    "kernel": line["kernel"],
                    "K x N": f"{line['k']} x {line['n']}",
                    "M": line["m"],
                    **{f"{key} us": round(value, 1) for key, value in us.items()},
                    "best / present": round(us["best"] / us["present"], 2),
                    "config": re.sub(r"\w+=", "", line["best"]),
                }
            )
    rows.sort(key=lambda row: (row["kernel"], row["K x N"], row["M"]))
    if rows:
        print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("found", type=Path, metavar="FOUND.jsonl")
    parser.add_argument("--seconds", type=float, default=420, help="for all of it")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--deadline", type=float, help=argparse.SUPPRESS
    )  # of a process that measures
    options = parser.parse_args()
    kernels = tuple(options.kernel or KERNELS)
    if options.deadline is not None:
        for kernel in kernels:
            measure(kernel, options.deadline, options.found, torch.device("cuda"))
        return
    begun = time.time()
    deadline = begun + options.seconds
    print(torch.cuda.get_device_name(), flush=True)
    compile_all(kernels, options.workers, options.seconds / 2, options.found)
    for number, kernel in enumerate(kernels):
        # Kernels share what is left evenly.
        until = time.time() + (deadline - time.time()) / (len(kernels) - number)
        command = [sys.executable, __file__, str(options.found), "--kernel", kernel]
        for _ in range(5):
            try:
                code = subprocess.run(
                    [*command, "--deadline", str(until)],
                    check=False,
                    timeout=max(30.0, until + 30 - time.time()),
                ).returncode
            except subprocess.TimeoutExpired:
                break
            if code == 0 or time.time() > until:
                break
            print(f"{kernel}: exit code {code}; again without what it was trying", flush=True)
    report(options.found)
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
