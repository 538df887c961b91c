"""The order in which the backbones scan a grid, one panel per direction.

    python tools/visualization/scan_paths.py vmamba vim mambavision vig --grid 6 8 --window-size 4 --out scans.png

The colour of a path runs from dark (first) to light (last); a ring marks its first cell and a square its last. Windows
are scanned independently of each other. Crosses are padding, the star is Vim's class token, which is visited between
its neighbours on the path.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli


def places(sequence: Sequence[int], width: int, columns: tuple[int, int]) -> list[tuple[float, float]]:
    """Where the tokens of a sequence are drawn, as (x, y).

    Padding has no number: it lies behind the token before, or where the next row of its window begins. `columns` are
    the window's first column and the one behind its last. Class tokens have no place.
    """
    found: list[tuple[float, float]] = []
    for token in sequence:
        if token >= 0:
            found.append((float(token % width), float(token // width)))
        elif token == -1:
            x, y = found[-1]
            found.append((x + 1, y) if x + 1 < columns[1] else (float(columns[0]), y + 1))
    return found


def draw_order(axis, order, height: int, width: int) -> None:
    """One direction into one panel."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    axis.set_aspect("equal")
    right, lower = width, height
    for sequence in order.sequences:
        left = 0 if order.window_width is None else sequence[0] % width  # a window begins with a cell, not padding
        points = places(sequence, width, (left, left + (order.window_width or width)))
        right, lower = max(right, *(int(x) + 1 for x, _ in points)), max(lower, *(int(y) + 1 for _, y in points))
        steps = list(itertools.pairwise(points))
        colours = [colormaps["viridis"](0.95 * i / max(1, len(steps) - 1)) for i in range(len(steps))]
        axis.add_collection(LineCollection(steps, colors=colours, linewidths=2.2, zorder=2))
        padding = [p for p, token in zip(points, [t for t in sequence if t != -2], strict=True) if token == -1]
        if padding:
            axis.plot(*zip(*padding, strict=True), "x", color="0.55", markersize=5, zorder=3)
        axis.plot(*points[0], "o", markerfacecolor="white", markeredgecolor=colours[0] if colours else "k", zorder=4)
        axis.plot(*points[-1], "s", color="#e69f00", zorder=4)
        for index, token in enumerate(sequence):
            if token == -2:
                axis.plot(*_between(points, sequence, index), "*", color="#d55e00", markersize=11, zorder=5)
    for x in range(width + 1):
        axis.plot([x - 0.5] * 2, [-0.5, height - 0.5], color="0.85", linewidth=0.8, zorder=1)
    for y in range(height + 1):
        axis.plot([-0.5, width - 0.5], [y - 0.5] * 2, color="0.85", linewidth=0.8, zorder=1)
    axis.set(xlim=(-0.9, right - 0.1), ylim=(lower - 0.1, -0.9))
    axis.set_axis_off()


def _between(points: Sequence[tuple[float, float]], sequence: Sequence[int], index: int) -> tuple[float, float]:
    """Middle of the step at which a class token is visited; beside the path where it comes first or last."""
    before = index - sum(token == -2 for token in sequence[:index])  # tokens on the path so far
    if 0 < before < len(points):
        return tuple((a + b) / 2 for a, b in zip(points[before - 1], points[before], strict=True))
    x, y = points[0] if before == 0 else points[-1]
    return x, y + (-0.65 if y == 0 else 0.65)


def draw(families: dict, height: int, width: int, path: Path) -> None:
    """One row per family."""
    from matplotlib.figure import Figure

    columns = max(len(orders) for orders in families.values())
    figure = Figure(figsize=(2.9 * columns, (2.9 * height / width + 0.45) * len(families)), dpi=110)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(families), columns, squeeze=False)
    for row, (family, orders) in zip(axes, families.items(), strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, order in zip(row, orders, strict=False):
            draw_order(axis, order, height, width)
            axis.set_title(f"{family}: {order.name}", fontsize=9)
    figure.savefig(path)


def run(args: argparse.Namespace) -> None:
    from mmvssm.analysis.scan_orders import scan_orders

    cls_token = None if args.cls_token == "none" else args.cls_token
    window = None if args.window_size == 0 else args.window_size
    options = dict(window_size=window, fit_windows=args.fit_windows, cls_token=cls_token)
    families = {family: scan_orders(family, *args.grid, **options) for family in args.families}
    draw(families, *args.grid, args.out)
    for family, orders in families.items():
        print(f"{family}: {', '.join(order.name for order in orders)}")


def main(argv: Sequence[str] | None = None) -> int:
    from mmvssm.analysis.scan_orders import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=FAMILIES, help="whose scans to draw, one row each")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--grid", type=int, nargs=2, default=[6, 8], metavar=("ROWS", "COLUMNS"), help="6 8")
    parser.add_argument("--window-size", type=int, default=4, help="of MambaVision (4); 0 for one window, the map")
    parser.add_argument("--fit-windows", action="store_true", help="divide the map instead of padding it (MambaVision)")
    parser.add_argument("--cls-token", choices=("middle", "head", "double", "none"), default="middle", help="of Vim")
    args = parser.parse_args(argv)
    return cli.run_tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
