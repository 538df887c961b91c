"""Writes a backbone's multi-stage features of images to files, one per image, with a manifest.

Interrupted runs are continued by the same command. Exit code 0: all images are done; 2: a mistake, told in one
sentence; 3: done, but some images could not be used; they are named on stderr and in failures.jsonl.
"""

import argparse
import sys
from collections.abc import Sequence

import mmvssm
from mmvssm.utils import cli


def export(args: argparse.Namespace) -> int:
    """Exports and reports; returns the exit code."""
    if args.size is not None and len(args.size) > 2:
        raise cli.UserError(f"--size takes one number (the short edge) or two (height, width), got {len(args.size)}")
    summary = mmvssm.extract_features(
        args.model,
        args.images[0] if len(args.images) == 1 else args.images,
        args.out,
        args.checkpoint,
        args.stages,
        pool=args.pool,
        size=args.size,
        pad_divisor=args.pad_divisor,
        format=args.format,
        dtype=args.dtype,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=args.device,
        image_root=args.image_root,
        visualize=args.visualize,
        progress=not args.quiet,
    )
    for name, reason in summary.failures.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    print(
        f"{summary.folder}: {summary.written} images written ({summary.images_per_second:.1f} images/s), "
        f"{summary.reused} finished before, {len(summary.failures)} skipped"
    )
    return 3 if summary.failures else 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of the model zoo (mmvssm.list_models, or a short one) or config file")
    parser.add_argument("images", nargs="+", help="image(s), a folder, a quoted pattern, or a COCO annotation file")
    parser.add_argument("--out", required=True, help="folder to write or to continue")
    parser.add_argument("--checkpoint", required=True, help="path or URL of the weights, or 'random' for a trial")
    parser.add_argument("--stages", type=int, nargs="+", metavar="I", help="stages (default: those of the config)")
    parser.add_argument("--pool", choices=("avg", "max"), help="write a vector per stage instead of a map")
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="N", help="short edge, or height and width (default: as they are)"
    )
    parser.add_argument("--pad-divisor", type=int, metavar="N", help="pad to multiples (default: of the config, or 1)")
    parser.add_argument("--format", choices=("npz", "safetensors"), default="npz", help="of the files (%(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images of equal size at a time (%(default)s)")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that load images (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--image-root", help="folder of the images of a COCO file (default: the file's own)")
    parser.add_argument("--visualize", action="store_true", help="also draw a sheet (PNG) for every image")
    parser.add_argument("--quiet", action="store_true", help="do not show the progress")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    codes: list[int] = []
    mistake = cli.run_tool(lambda: codes.append(export(args)))
    return mistake or codes[0]


if __name__ == "__main__":
    sys.exit(main())
