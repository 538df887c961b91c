"""Activation maps of an image: energy and principal components of every stage; for VMamba also what a pixel looks at.

    python tools/visualization/activations.py vmamba-tiny-s1l8 photo.jpg --checkpoint trained.pth --out sheet.png \\
        --query 300 200 --query-out query.png

The sheet is that of tools/export_features.py. The second picture shows, for the pixel `--query X Y` of the image and
the last block of each stage, how much every cell weighs in the four scans at that pixel, and the sum of the four.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mmvssm
from mmvssm.utils import cli

DIRECTIONS = ("rows", "columns", "rows, reversed", "columns, reversed", "sum")


def draw_sheet(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        summary = mmvssm.extract_features(
            args.model,
            args.image,
            folder,
            args.checkpoint,
            args.stages,
            size=args.size,
            num_workers=0,
            device=args.device,
            visualize=True,
            progress=False,
        )
        for name, reason in summary.failures.items():
            raise cli.UserError(f"{name}: {reason}")
        sheets = list(Path(folder, "sheets").rglob("*.png"))
        if len(sheets) != 1:
            raise cli.UserError(f"one image is drawn at a time, got {len(sheets)}; use tools/export_features.py")
        shutil.copyfile(sheets[0], args.out)


def draw_query(args: argparse.Namespace) -> None:
    import torch
    from matplotlib.figure import Figure
    from mmengine.config import Config

    from mmvssm.analysis.scan_attention import activation_maps
    from mmvssm.apis.feature_images import preprocessing_of
    from mmvssm.apis.zoo import config_path

    size = None if args.size is None else args.size[0] if len(args.size) == 1 else tuple(args.size)
    preprocessing = preprocessing_of(Config.fromfile(config_path(args.model)), size)
    pixels, original = preprocessing.load(args.image)
    x, y = args.query
    if not (0 <= x < original[1] and 0 <= y < original[0]):
        raise cli.UserError(f"--query {x} {y} lies outside of the image, {original[1]} x {original[0]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the random weights of the sheet
        checkpoint = None if args.checkpoint == "random" else args.checkpoint
        backbone = mmvssm.get_backbone(args.model, checkpoint, args.stages, args.device)
    image = preprocessing.to_input(pixels[None].to(args.device))
    H, W = pixels.shape[1:]
    x, y = x * W / original[1], y * H / original[0]
    figure = Figure(figsize=(2.3 * 6, (2.3 * H / W + 0.35) * len(backbone.out_indices)), dpi=110, layout="constrained")
    axes = figure.subplots(len(backbone.out_indices), 6, squeeze=False)
    shown = (pixels if preprocessing.channel_order == "rgb" else pixels.flip(0)).permute(1, 2, 0)
    with torch.no_grad():
        sizes = [features.shape[2:] for features in backbone(image)]
    for row, stage, stride, (h, w) in zip(axes, backbone.out_indices, backbone.out_strides, sizes, strict=True):
        cell = (min(int(y) // stride, h - 1), min(int(x) // stride, w - 1))  # patches may leave the last pixels out
        maps = activation_maps(backbone, image, stage, cell)
        maps = torch.cat([maps, maps.sum(0, keepdim=True)])
        row[0].imshow(shown)
        row[0].set_title(f"stage {stage}, cell {cell[0]}, {cell[1]}", fontsize=9)
        for axis, values, name in zip(row[1:], maps, DIRECTIONS, strict=True):
            extent = (0, values.shape[1] * stride, values.shape[0] * stride, 0)
            axis.imshow(values, cmap="inferno", vmin=0, vmax=float(values.max()), extent=extent)
            axis.set(xlim=(0, W), ylim=(H, 0))
            axis.set_title(name, fontsize=9)
        for axis in row:
            axis.plot(x, y, "+", color="#56b4e9", markersize=10, markeredgewidth=2)
            axis.set_axis_off()
    figure.savefig(args.query_out)


def run(args: argparse.Namespace) -> None:
    if (args.query is None) != (args.query_out is None):
        raise cli.UserError("--query and --query-out belong together: a pixel, and the picture to write")
    if args.size is not None and len(args.size) > 2:
        raise cli.UserError(f"--size takes one number (the short edge) or two (height, width), got {len(args.size)}")
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.query is not None:
        draw_query(args)
        print(args.query_out)
    draw_sheet(args)
    print(args.out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of the model zoo")
    parser.add_argument("image")
    parser.add_argument("--checkpoint", required=True, help="path or URL of the weights, or 'random' for a trial")
    parser.add_argument("--out", type=Path, required=True, help="sheet to write")
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[0, 1, 2, 3], metavar="I", help="0 1 2 3; blocks in plain backbones"
    )
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="short edge, or height and width")
    parser.add_argument("--query", type=int, nargs=2, metavar=("X", "Y"), help="pixel of the image (VMamba)")
    parser.add_argument("--query-out", type=Path, help="picture of what that pixel looks at")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    args = parser.parse_args(argv)
    return cli.run_tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
