"""Trains a classifier, detector or segmentor: the task is read from the config."""

import argparse
import sys
from collections.abc import Sequence

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="go on from a checkpoint; without PATH, or with 'auto', from the latest one in the work folder",
    )
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument("--no-validate", action="store_true", help="do not evaluate during training")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate by the batch size")
    parser.add_argument("--no-persistent-workers", action="store_true", help="restart loader workers every epoch")
    cli.add_common_arguments(parser)
    return parser.parse_args(argv)


def apply_arguments(cfg, args: argparse.Namespace) -> None:
    """Writes the command line's flags into the config."""
    cli.apply_common_arguments(cfg, args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.no_persistent_workers:
        for name in cli.LOADERS:
            if cfg.get(name):
                cfg[name].persistent_workers = False

    if args.amp:
        enable_amp(cfg)
    if str(cfg.optim_wrapper.get("type")).endswith("AmpOptimWrapper"):
        require_accelerator(args)

    if args.auto_scale_lr:
        if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
            raise cli.UserError("--auto-scale-lr: the config has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True

    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None
        if args.resume != "auto":
            cli.require_file(args.resume, "checkpoint")
            cfg.load_from = args.resume


def enable_amp(cfg) -> None:
    kind = cfg.optim_wrapper.get("type", "OptimWrapper")
    if kind == "AmpOptimWrapper":
        return
    if kind != "OptimWrapper":
        raise cli.UserError(f"--amp goes with optim_wrapper.type 'OptimWrapper', the config has {kind!r}")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def require_accelerator(args: argparse.Namespace) -> None:
    from mmengine.device import get_device

    if get_device() == "cpu":
        remedy = "leave out --amp" if args.amp else "add --cfg-options optim_wrapper.type=OptimWrapper"
        raise cli.UserError(f"mixed precision needs a GPU and none was found; {remedy} to train in float32")


def train(args: argparse.Namespace) -> None:
    cfg = cli.load_config(args.config, args.cfg_options, args.data_root)
    apply_arguments(cfg, args)
    runner = cli.build_runner(cfg)
    cli.watch(runner)
    runner.train()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return cli.run_tool(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
