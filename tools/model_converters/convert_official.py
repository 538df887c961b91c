"""Convert a checkpoint of the authors to one of this project that holds plain tensors only.

    python tools/model_converters/convert_official.py SOURCE TARGET [--family vmamba]
        [--raw-weights | --averaged-weights]

SOURCE is a path or URL, in any published layout and wrapper. A classification file gives `backbone.*` and `head.*`;
detection and segmentation files keep their heads.
"""

import argparse
import sys
from collections import Counter

from mmvssm import __version__
from mmvssm.checkpoints import convert_official, read_checkpoint
from mmvssm.checkpoints.convert import describe_backbone
from mmvssm.checkpoints.families import detect_family, known_families
from mmvssm.checkpoints.publish import save_plain


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint of the authors, path or URL")
    parser.add_argument("target", help="file to write, e.g. vmamba-tiny-s1l8.pth")
    parser.add_argument("--family", choices=known_families(), help="default: recognised by the names")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--raw-weights", action="store_true", help="take the raw weights where averaged ones exist too")
    which.add_argument("--averaged-weights", action="store_true", help="take the averaged ones")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        # Without a wish, those of the authors' published numbers.
        averaged = args.averaged_weights if args.averaged_weights or args.raw_weights else None
        converted = convert_official(read_checkpoint(args.source), args.family, prefer_ema=averaged)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
    family = detect_family({name.removeprefix("backbone.") for name in converted})
    arch, content = describe_backbone(converted, family)
    meta = {"mmvssm_version": __version__, "family": family.name, "arch": arch, "converted_from": args.source}
    path = save_plain(converted, args.target, meta)
    parts = Counter(name.partition(".")[0] for name in converted)
    print(f"{args.source} holds {content}.")
    print("Converted " + ", ".join(f"{count} tensors of {part}" for part, count in sorted(parts.items())) + ".")
    print(f"{sum(t.numel() for t in converted.values()):,} values written to {path}.")


if __name__ == "__main__":
    main()
