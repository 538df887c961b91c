"""Reduce a checkpoint of a training run to what others need: plain tensors and a few words about them.

    python tools/model_converters/publish_model.py SOURCE TARGET [--raw-weights] [--no-hash]

Optimiser, schedules, logs and random states are dropped; averaged weights are taken where the run kept them. The first
digits of the file's SHA-256 are added to its name.
"""

import argparse
import sys

from mmvssm import __version__
from mmvssm.checkpoints import read_checkpoint, unwrap
from mmvssm.checkpoints.publish import add_hash, save_plain

# Entries of `meta` that say how to use the weights; the rest describes the run.
KEPT_META = ("dataset_meta", "cfg", "epoch", "iter", "mmengine_version", "experiment_name")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint of a run, path or URL")
    parser.add_argument("target", help="file to write")
    parser.add_argument("--raw-weights", action="store_true", help="take the raw weights where averaged ones exist too")
    parser.add_argument("--no-hash", action="store_true", help="keep the name of TARGET as it is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        checkpoint = read_checkpoint(args.source)
        tensors = unwrap(checkpoint, prefer_ema=not args.raw_weights)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
    meta = checkpoint.get("meta", {}) if isinstance(checkpoint.get("meta", {}), dict) else {}
    kept = {key: meta[key] for key in KEPT_META if key in meta}
    path = save_plain(tensors, args.target, {**kept, "mmvssm_version": __version__})
    if not args.no_hash:
        path = add_hash(path)
    print(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values, written to {path}.")


if __name__ == "__main__":
    main()
