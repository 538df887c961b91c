"""Images per second and memory of classifiers at several image sizes, side by side.

    python tools/analysis_tools/benchmark_models.py vim-tiny timm:deit_tiny_patch16_224 --sizes 224 512 1024 2048 \\
        --modes inference training --dtype fp16 --graph --attention fused plain --json speed.json --plot speed.png

A model is a short name of the zoo, or `timm:` and a name of timm, if that is installed. Both are built for each size.
`--attention plain` lets timm's models compute attention with two products and a softmax instead of torch's fused
operator. The batch of a size is the one for 224 x 224, reduced as the number of pixels grows, and halved until it fits.
"""

import argparse
import contextlib
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import mmvssm
from mmvssm.utils import cli

BATCH_PIXELS = 224 * 224


def build(name: str, size: int, device: str):
    """A classifier with random weights for square images of `size`."""
    if not name.startswith("timm:"):
        return mmvssm.get_model(name, device=device, img_size=size)
    try:
        import timm
    except ModuleNotFoundError as error:
        raise cli.UserError(f"{name} needs timm, which is not installed: pip install timm") from error
    name = name.removeprefix("timm:")
    if not timm.is_model(name):
        raise cli.UserError(f"timm has no model {name!r}")
    with contextlib.suppress(TypeError):  # convolutional networks take any size
        return timm.create_model(name, img_size=size).to(device)
    return timm.create_model(name).to(device)


def measure(name: str, size: int, batch: int, args: argparse.Namespace, mode: str, graph: bool) -> dict | None:
    """The row of one measurement, at the largest batch that fits; None if not even one image does."""
    import torch

    from mmvssm.analysis import measure_speed

    gc.collect()  # what the model before has left
    model = build(name, size, args.device)
    while batch:
        try:
            images = torch.randn(batch, 3, size, size, device=args.device)
            speed = measure_speed(model, images, mode, args.dtype, graph, args.repeats)
        except torch.OutOfMemoryError:
            batch //= 2
            images = None
            torch.cuda.empty_cache()
            continue
        return dict(batch=batch, images_per_second=speed.images_per_second, ms=speed.milliseconds, mib=speed.memory)
    return None


def rows_of(args: argparse.Namespace) -> list[dict]:
    rows = []
    for mode in args.modes:
        for size in args.sizes:
            batch = args.batch_size or max(1, 128 * BATCH_PIXELS // size**2)
            for name in args.models:
                kinds = args.attention if name.startswith("timm:") else [None]
                for kind in kinds:
                    if kind is not None:
                        set_attention(kind)
                    for graph in (False, True) if args.graph else (False,):
                        row = dict(model=name, attention=kind, mode=mode, size=size, graph=graph)
                        result = measure(name, size, batch, args, mode, graph)
                        rows.append(row | (result or dict(batch=0)))
                        print(line(rows[-1]), flush=True)
    return rows


def set_attention(kind: str) -> None:
    with contextlib.suppress(ModuleNotFoundError):
        from timm.layers import set_fused_attn

        set_fused_attn(kind == "fused")


def line(row: dict) -> str:
    name = row["model"] + (f" ({row['attention']} attention)" if row["attention"] else "")
    how = "graph" if row["graph"] else "eager"
    start = f"{name:<50} {row['mode']:<9} {row['size']:>5} px  {how}  batch {row['batch']:>4}"
    if not row["batch"]:
        return f"{start}  does not fit"
    return f"{start}  {row['images_per_second']:>9.1f} images/s  {row['ms']:>9.2f} ms  {row['mib']:>8.0f} MiB"


def plot(rows: list[dict], path: str) -> None:
    """Time and memory of one image over the size, a curve for each model, eager and graph."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = sorted({row["mode"] for row in rows})
    figure, axes = pyplot.subplots(len(modes), 2, figsize=(11, 4 * len(modes)), squeeze=False)
    curves: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["batch"]:
            curves.setdefault((row["mode"], row["model"], row["attention"], row["graph"]), []).append(row)
    for (mode, model, attention, graph), points in curves.items():
        label = " ".join(filter(None, (model, attention, "graph" if graph else "eager")))
        sizes = [p["size"] for p in points]
        left, right = axes[modes.index(mode)]
        left.plot(sizes, [p["ms"] / p["batch"] for p in points], "--" if graph else "-", marker="o", label=label)
        if not graph:
            right.plot(sizes, [p["mib"] / p["batch"] for p in points], marker="o", label=label)
    for mode, (left, right) in zip(modes, axes, strict=True):
        for axis, unit in ((left, "ms per image"), (right, "MiB per image")):
            axis.set(title=mode, xlabel="pixels per side", ylabel=unit, xscale="log", yscale="log")
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> None:
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise cli.UserError(f"--device {args.device}: torch sees no GPU; --device cpu times the CPU")
    if args.graph and not args.device.startswith("cuda"):
        raise cli.UserError("--graph needs a GPU")
    rows = rows_of(args)
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    facts = dict(device=where, torch=torch.__version__, dtype=args.dtype, mmvssm=mmvssm.__version__)
    if args.json:
        Path(args.json).write_text(json.dumps(facts | dict(rows=rows), indent=1))
    if args.plot:
        plot(rows, args.plot)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="short names of the zoo, or timm:NAME")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="sides of the square images")
    parser.add_argument("--modes", nargs="+", choices=["inference", "training"], default=["inference"])
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16", help="of autocast")
    parser.add_argument("--batch-size", type=int, help="for every size; else 128 at 224 pixels and fewer above")
    parser.add_argument("--graph", action="store_true", help="time replays of a CUDA graph, too")
    parser.add_argument(
        "--attention", nargs="+", choices=["fused", "plain"], default=["fused"], help="of timm's models"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed steps, of which the median counts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--plot", help="write curves to this picture")
    args = parser.parse_args(argv)
    return cli.run_tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
