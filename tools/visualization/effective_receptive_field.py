"""Effective receptive fields of backbones side by side, before and after training, as in the VMamba paper.

    python tools/visualization/effective_receptive_field.py vmamba-tiny-s1l8=trained.pth timm:resnet50 vim-tiny \\
        --images photos --size 1024 --out erf.png --json erf.json

A model is a short name of the zoo or `timm:` and a name of timm (where that is installed), with `=` and a checkpoint
for the row of trained weights. Every panel shows, on a logarithmic scale, how much each pixel contributes to the centre
of the last feature map (see mmvssm/analysis/receptive_field.py), and the smallest centred squares that hold 50 % and
99 % of it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli

DECADES = 4  # of the colours, below the greatest contribution
SQUARES = {0.5: "#56b4e9", 0.99: "#009e73"}


def batches(args: argparse.Namespace, size: tuple[int, int]) -> Iterator:
    """Normalised images, in batches: those of the user, else noise."""
    import torch

    from mmvssm.apis.feature_images import Preprocessing
    from mmvssm.apis.feature_sources import find_images

    if args.images is None:
        noise = torch.Generator().manual_seed(0)
        for start in range(0, args.count, args.batch_size):
            yield torch.randn(min(args.batch_size, args.count - start), 3, *size, generator=noise).to(args.device)
        return
    imagenet = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "rgb", "bicubic", size)
    entries = find_images(args.images)[: args.count]
    for start in range(0, len(entries), args.batch_size):
        pixels = [imagenet.load(entry.path)[0] for entry in entries[start : start + args.batch_size]]
        yield imagenet.to_input(torch.stack(pixels).to(args.device))


def field_of(name: str, checkpoint: str | None, args: argparse.Namespace, size: tuple[int, int]) -> dict:
    """The row of the JSON file of one panel, with the receptive field itself under 'field'."""
    import torch

    from mmvssm.analysis.contenders import build_backbone
    from mmvssm.analysis.receptive_field import effective_receptive_field

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        backbone = build_backbone(name, size, args.stage, checkpoint).requires_grad_(False).to(args.device)
    found = effective_receptive_field(backbone, batches(args, size), args.rectify)
    state = "trained" if checkpoint else "random weights"
    fields = found.summary(args.thresholds)
    shares = ", ".join(f"{float(t):.0%}: {field['side']} px ({field['side_share']:.0%})" for t, field in fields.items())
    print(f"{name}, {state}: side of the square that holds {shares}", flush=True)
    return dict(model=name, state=state, checkpoint=checkpoint, thresholds=fields, field=found)


def draw(panels: list[dict], args: argparse.Namespace) -> None:
    """One column for every model, one row for random and one for trained weights."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    models = list(dict.fromkeys(panel["model"] for panel in panels))
    states = list(dict.fromkeys(sorted(panel["state"] for panel in panels)))
    figure = Figure(figsize=(3.1 * len(models) + 1, 3.3 * len(states) + 0.7), dpi=110, layout="constrained")
    axes = figure.subplots(len(states), len(models), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    picture = None
    for panel in panels:
        axis = axes[states.index(panel["state"]), models.index(panel["model"])]
        field = panel["field"]
        values = field.contribution / field.contribution.max().clamp_min(1e-300)
        H, W = values.shape
        norm = LogNorm(10.0**-DECADES, 1)
        picture = axis.imshow(values.clamp_min(10.0**-DECADES), cmap="inferno", norm=norm, interpolation="none")
        for share, colour in SQUARES.items():
            side = field.side(share)
            corner = (field.centre[1] - side / 2, field.centre[0] - side / 2)
            axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.2))
        axis.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5))
        sides = [f"{float(t):.0%}: {row['side']} px" for t, row in panel["thresholds"].items()]
        lines = [f"{panel['model']}", panel["state"], *(", ".join(sides[i : i + 2]) for i in range(0, len(sides), 2))]
        axis.set_title("\n".join(lines), fontsize=8)
    if picture is not None:
        label = "contribution, relative to the greatest"
        figure.colorbar(picture, ax=axes, shrink=0.8, label=label, extend="min")
    squares = " and ".join(f"{share:.0%} ({name})" for share, name in zip(SQUARES, ("blue", "green"), strict=True))
    what = f"{args.count} image{'s' if args.count > 1 else ''}{'' if args.images else ' of noise'}"
    figure.suptitle(f"Effective receptive field of the centre, {what}; squares hold {squares}", fontsize=9)
    figure.savefig(args.out)


def run(args: argparse.Namespace) -> None:
    import torch

    if len(args.size) > 2 or min(args.size) < 1:
        raise cli.UserError(f"--size takes one positive number or two, height and width, got {args.size}")
    if min(args.count, args.batch_size) < 1:
        raise cli.UserError(f"--count and --batch-size must be at least 1, got {args.count} and {args.batch_size}")
    if any(not 0 < threshold < 1 for threshold in args.thresholds):
        raise cli.UserError(f"--thresholds are shares between 0 and 1, got {args.thresholds}")
    if args.images is not None:
        from mmvssm.apis.feature_sources import find_images

        args.count = len(find_images(args.images)[: args.count])
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    size = (args.size[0], args.size[-1])
    panels = []
    for text in args.models:
        name, _, checkpoint = text.partition("=")
        panels.append(field_of(name, None, args, size))
        if checkpoint:
            panels.append(field_of(name, checkpoint, args, size))
    draw(panels, args)
    if args.json is not None:
        rows = [{key: value for key, value in panel.items() if key != "field"} for panel in panels]
        facts = dict(size=size, images=args.images, count=args.count, rectify=args.rectify, stage=args.stage)
        args.json.write_text(json.dumps(facts | dict(seed=args.seed, models=rows), indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL[=CHECKPOINT]", help="name of the zoo or timm:NAME, with trained weights")
    add("--out", type=Path, required=True, help="picture to write")
    add("--json", type=Path, help="file for sides and areas at the thresholds")
    add("--images", help="image, folder, quoted pattern or COCO file; noise by default")
    add("--count", type=int, default=50, help="images to average over, at most (%(default)s)")
    add("--size", type=int, nargs="+", default=[1024], help="to which images are resized: a side, or height and width")
    add("--stage", type=int, default=-1, help="stage (block, in plain backbones) whose centre is looked at: the last")
    add("--rectify", choices=("relu", "abs"), default="relu", help="which gradients count: positive ones, or all")
    add("--thresholds", type=float, nargs="+", default=[0.2, 0.3, 0.5, 0.99], help="shares for sides and areas")
    add("--batch-size", type=int, default=1)
    add("--seed", type=int, default=0, help="of the random weights")
    add("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    args = parser.parse_args(argv)
    return cli.run_tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
