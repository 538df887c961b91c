"""Writes the feature maps of a backbone, and of the neck behind it, to files: one per image, with a manifest.

Interrupted runs are continued by the same command. Exit code 0: all images are done; 2: a mistake, told in one
sentence; 3: done, but some images could not be used; they are named on stderr and in failures.jsonl.
"""

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import Config, DictAction

import mmvssm
from mmvssm.apis.zoo import config_path
from mmvssm.utils import cli

_EXAMPLES = """
examples:
  export_features.py vmamba-tiny-s1l8 photos --checkpoint vmamba.pth --stages 0 1 2 3 --out features --visualize
  export_features.py mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco a.jpg --checkpoint detector.pth --neck --out levels
  export_features.py CONFIG --dataset val --data-root data/coco/ --checkpoint detector.pth --out features
  export_features.py vim-tiny "photos/**/*.png" --checkpoint random --size 224 --pool avg --out trial
"""


def export(args: argparse.Namespace) -> int:
    """Exports and reports; returns the exit code."""
    for option, value in (("--size", args.size), ("--map-size", args.map_size)):
        if value is not None and len(value) > 2:
            what = "the short edge" if option == "--size" else "a square"
            raise cli.UserError(f"{option} takes one number ({what}) or two (height, width), got {len(value)}")
    if not args.images and args.dataset is None:
        raise cli.UserError("give images (files, a folder, a pattern, a COCO file), or --dataset train, val or test")
    summary = mmvssm.extract_features(
        _read_model(args),
        args.images[0] if len(args.images) == 1 else args.images or None,
        args.out,
        args.checkpoint,
        args.stages,
        neck=False if args.neck is None else args.neck or True,
        dataset=args.dataset,
        pool=args.pool,
        map_size=args.map_size,
        size=args.size,
        max_size=args.max_size,
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


def _read_model(args: argparse.Namespace) -> str | Config:
    """The model as it was named, or its config with the changes of the command line."""
    if args.cfg_options is None and args.data_root is None:
        return args.model
    path = args.model if args.model.endswith(".py") else str(config_path(args.model))
    return cli.load_config(path, args.cfg_options, args.data_root)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s MODEL [IMAGES ...] --checkpoint CHECKPOINT --out FOLDER [options]",
    )
    parser.add_argument("model", metavar="MODEL", help="name of the zoo (mmvssm.list_models, or short) or config file")
    parser.add_argument(
        "images", metavar="IMAGES", nargs="*", help="image(s), a folder, a quoted pattern, or a COCO annotation file"
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder to write or to continue")
    parser.add_argument("--checkpoint", required=True, help="path or URL of the weights, 'official' or 'random'")

    source = parser.add_argument_group("images")
    source.add_argument("--dataset", choices=("train", "val", "test"), help="those of the config's data set instead")
    source.add_argument("--data-root", metavar="FOLDER", help="use this wherever the config names its data_root")
    source.add_argument("--image-root", metavar="FOLDER", help="of the images of a COCO file (default: its own)")
    source.add_argument(
        "--size", type=int, nargs="+", metavar="N", help="resize to a short edge, or a height and width"
    )
    source.add_argument("--max-size", type=int, metavar="N", help="make images smaller whose long edge exceeds this")
    source.add_argument("--pad-divisor", type=int, metavar="N", help="pad to multiples (default: of the config, or 1)")

    output = parser.add_argument_group("features")
    output.add_argument(
        "--stages", type=int, nargs="*", metavar="I",
        help="stages of the backbone (default: those of the config); without numbers none, beside --neck",
    )  # fmt: skip
    output.add_argument(
        "--neck", type=int, nargs="*", metavar="J", help="also levels of the neck, such as an FPN; without numbers all"
    )
    output.add_argument("--pool", choices=("avg", "max"), help="write a vector per stage instead of a map")
    output.add_argument("--map-size", type=int, nargs="+", metavar="N", help="resize maps to height and width in cells")
    output.add_argument(
        "--format", choices=("npz", "safetensors", "hdf5"), default="npz", help="of files (%(default)s)"
    )
    output.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision (%(default)s)")
    output.add_argument("--visualize", action="store_true", help="also draw a sheet (PNG) for every image")

    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=int, default=8, metavar="N", help="images run together (%(default)s)")
    running.add_argument("--num-workers", type=int, default=2, metavar="N", help="loading processes (%(default)s)")
    running.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    running.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change the config")
    running.add_argument("--quiet", action="store_true", help="do not show the progress")
    args, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.images += rest  # those behind an option, which argparse does not take, since there may be no images at all
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    codes: list[int] = []
    try:
        mistake = cli.run_tool(lambda: codes.append(export(args)))
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return mistake or codes[0]


if __name__ == "__main__":
    sys.exit(main())
