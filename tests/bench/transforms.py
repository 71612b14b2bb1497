"""Every transform, and every layout there and back, beside a device copy of as many bytes.

``python tests/bench/transforms.py [cpu|cuda|xpu]``. Each result is first compared with a plain
reference; a wrong one ends the run. ``share`` is the speed as a share of the copy's.
"""

from __future__ import annotations

import sys

import bench_layouts
import bench_marlin
import bench_packed
import bench_sparse24
import torch


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    print(f"{'transform':<34} {'N x K':>14} {'dtype':>18} {'us':>10} {'TB/s':>7} {'copy':>7} share")
    for bench in (bench_packed, bench_marlin, bench_sparse24, bench_layouts):
        for row in bench.measure(device):
            shape = (
                row["shape"] if isinstance(row["shape"], str) else "x".join(map(str, row["shape"]))
            )
            print(
                f"{row['name']:<34} {shape:>14} {row['dtype']:>18} {row['us']:>10.1f} "
                f"{row['tb_s']:>7.3f} {row['copy_tb_s']:>7.3f} {row['share']:>5.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
