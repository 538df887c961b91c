"""Draw one logged quantity of several runs into one picture, for example the losses of two backbones.

    plot_runs.py VMamba=work_dirs/a Swin-T=work_dirs/b --key loss --out loss.png

Reads what MMEngine writes to ``<work dir>/<time stamp>/vis_data/scalars.json``. Thin lines are the logged values
(MMEngine has averaged losses over its log window already), thick lines their running mean over ``--smooth`` points.
"""

import argparse
import difflib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli

# Told apart with every common kind of colour blindness, and by brightness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def log_files(path: Path) -> list[Path]:
    """The logs of a run in order of time: several if it was resumed.

    Args:
        path: Work folder, one of its time-stamped folders, or a ``scalars.json``.
    """
    if path.is_file():
        return [path]
    files = [file for depth in ("", "*/") for file in path.glob(f"{depth}vis_data/scalars.json")]
    if not files:
        raise cli.UserError(f"{path} holds no log: neither vis_data/scalars.json nor */vis_data/scalars.json found")
    return sorted(files)  # the folders are named after the time


def read_rows(file: Path) -> list[dict]:
    """The records of one log. A last line that a killed run left unfinished is dropped."""
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) and rows:
                break
            raise cli.UserError(f"{file}, record {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise cli.UserError(f"{file}, record {number}, is not a record of a log but {line[:40]!r}")
        rows.append(row)
    return rows


def read_curve(path: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity.

    A resumed run replaces what its predecessor logged from the same step on.

    Args:
        path: See :func:`log_files`.
        key: Name in the log: ``loss``, ``grad_norm``, ``coco/segm_mAP``.

    Returns:
        Steps and values of equal length. A step is an iteration for what training logs; for a metric of evaluation it
        is an epoch if the run counts epochs.
    """
    curve: dict[int, float] = {}
    known: set[str] = set()
    for file in log_files(Path(path)):
        rows = read_rows(file)
        known |= {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
        points = [(row["step"], float(row[key])) for row in rows if key in row and "step" in row]
        if points:
            curve = {step: value for step, value in curve.items() if step < points[0][0]}
            curve.update(points)
    if not curve:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(sorted(known)) or 'nothing'}"
        raise cli.UserError(f"{path} logs no {key!r}{hint}")
    return list(curve), list(curve.values())


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over ``width`` neighbours (odd; fewer if there are fewer points), NaN at both ends where some are missing.

    A shorter mean at the ends would bend a falling curve and show the noise of the last points as a trend. Values that
    are not finite do not take part.
    """
    half, means = min(width - 1, len(values) - 1) // 2, []
    for i in range(len(values)):
        whole = half <= i < len(values) - half
        near = [value for value in values[i - half : i + half + 1] if math.isfinite(value)] if whole else []
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def draw(curves: dict[str, tuple[list[int], list[float]]], args: argparse.Namespace) -> None:
    """Writes the picture; its format follows the file name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        finite = [value if math.isfinite(value) else math.nan for value in values]
        if args.smooth > 1:
            axes.plot(steps, finite, color=colour, linewidth=0.9, alpha=0.4)
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, running_mean(values, args.smooth), color=colour, linewidth=2, label=name, marker=marker)
    axes.set_xlabel(args.xlabel)
    axes.set_ylabel(f"{args.key} (thick: mean of {args.smooth} points)" if args.smooth > 1 else args.key)
    axes.set_title(args.title or "")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(args.out)
    except (OSError, ValueError) as error:
        raise cli.UserError(f"--out {args.out} cannot be written: {error}") from error


def plot_runs(args: argparse.Namespace) -> None:
    if args.smooth < 1 or args.smooth % 2 == 0:
        raise cli.UserError(f"--smooth takes an odd number of points, 1 for none, got {args.smooth}")
    curves = {}
    for run in args.runs:
        name, separator, path = run.partition("=")
        if not (name and separator and path):
            raise cli.UserError(f"runs are given as NAME=WORK_DIR, got {run!r}")
        if name in curves:
            raise cli.UserError(f"two runs are called {name!r}")
        curves[name] = read_curve(path, args.key)
    draw(curves, args)
    for name, (steps, values) in curves.items():
        infinite = sum(not math.isfinite(value) for value in values)
        note = f", {infinite} not finite and left out" if infinite else ""
        print(f"{name}: {len(steps)} points, last {args.key} {values[-1]:.4g} at step {steps[-1]}{note}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=WORK_DIR", help="label and work folder (or scalars.json)")
    parser.add_argument("--key", default="loss", help="what to draw, as named in the log (loss)")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--smooth", type=int, default=5, metavar="N", help="points of the running mean, odd (5)")
    parser.add_argument("--title", help="heading of the picture")
    parser.add_argument("--xlabel", default="iteration", help="what a step is (iteration)")
    args = parser.parse_args(argv)
    return cli.run_tool(lambda: plot_runs(args))


if __name__ == "__main__":
    sys.exit(main())
