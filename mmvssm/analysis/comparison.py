"""What a table of speeds says: rows as text, where one model overtakes another, curves over the resolution."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from mmvssm.analysis.benchmark import FAILED, FITS, TOO_LARGE

# Told apart with every common kind of colour blindness, and by brightness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_STYLES = {"eager": "-", "compile": "-.", "graph": "--", "compile-graph": ":"}
_METRICS = {"time": "ms", "memory": "mib"}


def size_name(row: dict) -> str:
    """'224' or '800x1216' (height x width)."""
    return str(row["height"]) if row["height"] == row["width"] else f"{row['height']}x{row['width']}"


def line(row: dict) -> str:
    """A row as one line of text."""
    start = (
        f"{row['model']:<42} {row['mode']:<9} {size_name(row):>8} px  {row['dtype']:<4}  {row['execution']:<13} "
        f"batch {row.get('batch', row['asked_batch']):>4}"
    )
    if row["status"] != FITS:
        return f"{start}  {row['status']}" + (f": {row['error']}" if row["status"] == FAILED else "")
    kernels = f"  kernels {row['kernel_ms']:>8.2f} ms" if row["kernel_ms"] is not None else ""
    memory = f"  {row['mib']:>7.0f} MiB" if row["mib"] else ""
    spread = f"(p90 {row['p90']:.2f}, p99 {row['p99']:.2f})"
    return f"{start}  {row['images_per_second']:>9.1f} images/s  {row['ms']:>9.2f} ms {spread}{kernels}{memory}"


def markdown(rows: Sequence[dict]) -> str:
    """The rows as a table for a page."""
    head = (
        "Model", "Step", "Size", "Batch", "dtype", "Execution",
        "images/s", "ms", "p90", "p99", "Kernel ms", "Peak MiB",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        key = [row["model"], row["mode"], size_name(row), row.get("batch", "-"), row["dtype"], row["execution"]]
        if row["status"] == FITS:
            kernels = "-" if row["kernel_ms"] is None else f"{row['kernel_ms']:.2f}"
            times = [f"{row[name]:.2f}" for name in ("ms", "p90", "p99")]
            values = [f"{row['images_per_second']:.1f}", *times, kernels, f"{row['mib']:.0f}" if row["mib"] else "-"]
        else:
            values = [row["status"], *["-"] * 5]
        lines.append("| " + " | ".join(map(str, [*key, *values])) + " |")
    return "\n".join(lines)


@dataclass
class Crossover:
    """Where one model overtakes another.

    Attributes:
        first: The model that is looked at.
        second: What it is compared with.
        mode, dtype, execution: What both were measured with.
        metric: 'time' or 'memory', of one image.
        ratios: Size -> value of the second over that of the first: above 1 the first is better. Infinite where the
            second does not fit, 0 where the first does not.
        size: The smallest measured size from which on the first is better at all sizes; None if there is none.
    """

    first: str
    second: str
    mode: str
    dtype: str
    execution: str
    metric: str
    ratios: dict[str, float]
    size: str | None

    def __str__(self) -> str:
        better = "faster" if self.metric == "time" else "smaller in memory"
        values = ", ".join(f"{size}: {_times(ratio)}" for size, ratio in self.ratios.items())
        where = f"from {self.size} px on" if self.size is not None else f"at no size up to {list(self.ratios)[-1]} px"
        if self.size is None and any(ratio > 1 for ratio in self.ratios.values()):
            where = f"at {' and '.join(s for s, r in self.ratios.items() if r > 1)} px, but not above"
        if self.size is not None and self.size == next(iter(self.ratios)):
            where = "at all measured sizes" if len(self.ratios) > 1 else f"at {self.size} px"
        how = f"{self.mode}, {self.dtype}, {self.execution}"
        return f"{self.first} is {better} than {self.second} {where} ({how}; {values})"

    def as_dict(self) -> dict:
        """For JSON, which knows no infinity."""
        ratios = {size: ratio if math.isfinite(ratio) else "second does not fit" for size, ratio in self.ratios.items()}
        return {**self.__dict__, "ratios": ratios}


def _times(ratio: float) -> str:
    return "the other does not fit" if math.isinf(ratio) else f"{ratio:.2f}x" if ratio else "does not fit"


def find_crossovers(rows: Sequence[dict], first: str, second: str) -> list[Crossover]:
    """Compare two models at the sizes at which both were tried, by time and by memory of one image.

    Args:
        rows: Of :func:`~mmvssm.analysis.benchmark.run_cells`.
        first: Name of a model in them.
        second: Name of another.

    Returns:
        For every mode, dtype and execution one about time and, where memory was measured, one about memory.

    Raises:
        ValueError: There is no such model.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    if missing := [name for name in (first, second) if name not in names]:
        raise ValueError(f"there is no model {missing[0]!r} to compare; measured: {', '.join(names)}")
    tried = [row for row in rows if row["status"] in (FITS, TOO_LARGE)]
    found = []
    for how in dict.fromkeys((row["mode"], row["dtype"], row["execution"]) for row in tried):
        values = [_by_size(tried, name, how) for name in (first, second)]
        both = sorted(values[0].keys() & values[1].keys(), key=lambda size: math.prod(size))
        for metric, key in _METRICS.items():
            ratios = {}
            for height, width in both:
                a, b = (_per_image(value[height, width], key) for value in values)
                if a == b == math.inf or 0 in (a, b):  # neither fits, or nothing was measured
                    continue
                name = size_name(dict(height=height, width=width))
                ratios[name] = b / a if math.isfinite(a) else 0.0
            if ratios:
                found.append(Crossover(first, second, *how, metric, ratios, _first_for_good(ratios)))
    return found


def _by_size(rows: Sequence[dict], model: str, how: tuple) -> dict[tuple[int, int], dict]:
    mine = [row for row in rows if row["model"] == model and (row["mode"], row["dtype"], row["execution"]) == how]
    return {(row["height"], row["width"]): row for row in mine}


def _per_image(row: dict, key: str) -> float:
    return row[key] / row["batch"] if row["status"] == FITS else math.inf


def _first_for_good(ratios: dict[str, float]) -> str | None:
    found = None
    for size in reversed(ratios):
        if ratios[size] <= 1:
            break
        found = size
    return found


def plot(rows: Sequence[dict], path: str | os.PathLike, title: str = "", crossovers: Sequence[Crossover] = ()) -> None:
    """Draw time and memory of one image over the resolution, a curve for each model and execution.

    Args:
        rows: Of :func:`~mmvssm.analysis.benchmark.run_cells`.
        path: Picture to write; its format follows the name.
        title: Above everything: the device, for example.
        crossovers: Marked by vertical lines.

    Raises:
        ValueError: Nothing was measured, or the name of the picture has no known format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    measured = [row for row in rows if row["status"] == FITS]
    if not measured:
        raise ValueError("nothing was measured, so there is nothing to draw")
    models = list(dict.fromkeys(row["model"] for row in rows))
    panels = list(dict.fromkeys((row["mode"], row["dtype"]) for row in measured))
    metrics = [metric for metric, key in _METRICS.items() if any(row[key] for row in measured)]
    height = 3.6 * len(panels) + 0.6 + 0.2 * len(models)
    figure = Figure(figsize=(5.6 * len(metrics), height), dpi=110, layout="constrained")
    axes = figure.subplots(len(panels), len(metrics), squeeze=False)
    for (mode, dtype), line_of_axes in zip(panels, axes, strict=True):
        for metric, axis in zip(metrics, line_of_axes, strict=True):
            here = [row for row in measured if (row["mode"], row["dtype"]) == (mode, dtype)]
            curves = list(dict.fromkeys((row["model"], row["execution"]) for row in here))
            for model, execution in curves:
                if metric == "memory" and execution == "graph" and (model, "eager") in curves:
                    continue  # what eager takes, and nearly the same number
                points = [row for row in here if (row["model"], row["execution"]) == (model, execution)]
                points.sort(key=_side)
                axis.plot(
                    [_side(row) for row in points],
                    [_per_image(row, _METRICS[metric]) for row in points],
                    _STYLES[execution],
                    color=COLOURS[models.index(model) % len(COLOURS)],
                    marker="o",
                    markersize=4,
                    label=f"{model} ({execution})",
                )
            sides = {_side(row): size_name(row) for row in here}
            for crossover in crossovers:
                if (crossover.mode, crossover.dtype, crossover.metric) == (mode, dtype, metric) and crossover.size:
                    x = next((side for side, name in sides.items() if name == crossover.size), None)
                    if x is not None:
                        colour = COLOURS[models.index(crossover.first) % len(COLOURS)]
                        axis.axvline(x, color=colour, linestyle=_STYLES[crossover.execution], linewidth=1, alpha=0.4)
            axis.set(xscale="log", yscale="log", title=f"{mode}, {dtype}: {metric} of one image")
            axis.set_xticks(list(sides), list(sides.values()))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlabel("pixels per side")
            axis.set_ylabel("ms" if metric == "time" else "MiB")
            axis.grid(color="0.9", which="both")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def _side(row: dict) -> float:
    """Side of the square with as many pixels."""
    return math.sqrt(row["height"] * row["width"])
