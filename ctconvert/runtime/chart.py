"""The roofline chart of ``bench --plot``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ctconvert.errors import UsageError
from ctconvert.store.places import check_file

if TYPE_CHECKING:
    from ctconvert.runtime.benchmark import BenchReport

#: What :func:`plot` writes, by the file's suffix.
CHARTS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Checks that a chart can be written to ``path``, before anything is measured for it.

    Raises:
        UsageError: its suffix is none of :data:`CHARTS`, it cannot be written, or matplotlib is
            not installed.
    """
    check_file(path, "--plot", CHARTS)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'ctconvert[plot]'") from None


def plot(result: BenchReport, path: Path) -> None:
    """A roofline chart: each kernel's flop/s over its intensity, under the measured limits.

    There is a roof for each type the kernels multiply in. Embeddings, which multiply nothing, are
    not in it.

    Args:
        result: what ``benchmark.bench`` returned.
        path: the file to write, replaced where it exists.

    Raises:
        UsageError: as :func:`check_plot`.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result.rows if row.product is not None]
    copy = result.copy_bytes_per_second
    roofs = {row.product: row.product_flops for row in rows if row.product_flops}
    roofs = roofs or {"bf16": result.matmul_flops["bf16"]}
    intensities = [row.intensity for row in rows if row.intensity is not None]
    low = min(intensities, default=1.0) / 2
    high = max([*intensities, 4 * max(roofs.values()) / copy])
    figure, axes = pyplot.subplots(figsize=(9, 6))
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    styles = ("-", "--", "-.", ":")
    for index, (product, roof) in enumerate(roofs.items()):
        axes.loglog(
            steps,
            [min(copy * x, roof) / 1e12 for x in steps],
            color="black",
            linestyle=styles[index % len(styles)],
            label=f"{product} limit, {roof / 1e12:.2f} TFLOP/s",
        )
    for layout in dict.fromkeys(row.layout for row in rows):
        chosen = [row for row in rows if row.layout == layout]
        axes.scatter(
            [row.intensity for row in chosen],
            [(row.flops or 0.0) / 1e12 for row in chosen],
            label=layout,
        )
    axes.set_xlabel("flop per byte moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{result.device}: copy {copy / 1e12:.3f} TB/s")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
