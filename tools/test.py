"""Evaluates a checkpoint of a classifier, detector or segmentor: the task is read from the config."""

import argparse
import sys
from collections.abc import Sequence
from copy import deepcopy

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="file to evaluate")
    parser.add_argument(
        "--out",
        help="write the predictions to this .pkl file; for segmentation a folder instead writes one label map an image",
    )
    parser.add_argument(
        "--out-item", choices=["metrics", "pred"], default="pred", help="what --out writes, the predictions by default"
    )
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument("--show-dir", help="paint the predictions into this folder")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds that each window stays open")
    parser.add_argument("--interval", type=int, help="show or paint every so many batches")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation: the config's, or a flip")
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    cli.add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.out is not None and args.out_item == "metrics" and not args.out.endswith((".json", ".pkl", ".yml")):
        parser.error(f"--out {args.out}: metrics are written to a .json, .pkl or .yml file")
    return args


def apply_arguments(cfg, args: argparse.Namespace) -> None:
    """Writes the command line's flags into the config."""
    cli.apply_common_arguments(cfg, args)
    task = cli.task_of(cfg)
    cli.require_file(args.checkpoint, "checkpoint")
    cfg.load_from = args.checkpoint
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir:
        enable_drawing(cfg, args, task)
    if args.tta:
        if task == "classification" and (args.show or args.show_dir):
            raise cli.UserError(
                "--tta cannot be combined with --show or --show-dir: mmpretrain draws single views only"
            )
        enable_tta(cfg, task)
    if args.out is not None and args.out_item == "pred" and not args.out.endswith((".pkl", ".pickle")):
        if task != "segmentation":
            raise cli.UserError(f"--out {args.out}: predictions of a {task} model are written to a .pkl file")
        cfg.test_evaluator.output_dir = args.out
        cfg.test_evaluator.keep_results = True


def enable_drawing(cfg, args: argparse.Namespace, task: str) -> None:
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    if hook is None:
        raise cli.UserError("--show and --show-dir need default_hooks.visualization, which the config lacks")
    hook["enable" if task == "classification" else "draw"] = True
    hook["show"] = args.show
    hook["wait_time"] = args.wait_time
    if args.interval is not None:
        hook["interval"] = args.interval
    elif task == "classification":
        hook["interval"] = 1  # as mmpretrain's tool; its hook would paint every 5000th image
    if args.show_dir and task == "classification":
        hook["out_dir"] = args.show_dir
    elif args.show_dir and task == "detection":
        hook["test_out_dir"] = args.show_dir
    elif args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


# Augmentation for configs that bring none: the image and its mirror image.
_TTA_MODELS = {
    "classification": dict(type="mmpretrain.AverageClsScoreTTA"),
    "detection": dict(
        type="mmvssm.InstanceTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)
    ),
    "segmentation": dict(type="mmseg.SegTTAModel"),
}
_DET_META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def enable_tta(cfg, task: str) -> None:
    from mmengine.config import ConfigDict

    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    if task == "detection":
        import mmvssm.engine.instance_tta  # noqa: F401  registers the model below
    pipeline = cfg.get("tta_pipeline")
    if pipeline is None:
        pipeline = deepcopy(dataset.pipeline)
        pack = pipeline[-1]
        if task == "detection":
            pack["meta_keys"] = _DET_META_KEYS
        flips = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
        pipeline[-1] = dict(type="TestTimeAug", transforms=[flips, [pack]])
    model = cfg.get("tta_model") or _TTA_MODELS[task]
    cfg.model = ConfigDict(**deepcopy(model), module=cfg.model)
    dataset.pipeline = pipeline


def test(args: argparse.Namespace) -> dict:
    """Returns the metrics."""
    cfg = cli.load_config(args.config, args.cfg_options, args.data_root)
    apply_arguments(cfg, args)
    runner = cli.build_runner(cfg)
    if args.out is not None and args.out_item == "pred" and args.out.endswith((".pkl", ".pickle")):
        runner.test_evaluator.metrics.append(_dump_metric(cli.task_of(cfg))(out_file_path=args.out))
    cli.watch(runner)
    runner.register_hook(cli.CheckedLoading())
    metrics = runner.test()
    if args.out is not None and args.out_item == "metrics":
        import mmengine

        mmengine.dump(metrics, args.out)
    return metrics


def _dump_metric(task: str):
    if task == "detection":  # stores masks as RLE
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults
    from mmengine.evaluator import DumpResults

    return DumpResults


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return cli.run_tool(lambda: test(args))


if __name__ == "__main__":
    sys.exit(main())
