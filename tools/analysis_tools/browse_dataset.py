"""Draw samples of a config's data set, as they enter training, into a folder.

    python tools/analysis_tools/browse_dataset.py CONFIG --data-root data/coco/ --out samples --count 20

Samples pass through the whole pipeline of the data set, random augmentations included, and are drawn with their
annotations by the visualizer of the library that owns the config (mmdet, mmseg or mmpretrain). No display is needed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli


def build_dataset(cfg, part: str):
    """The data set of a loader, with its pipeline."""
    from mmengine.registry import DATASETS, init_default_scope

    init_default_scope(cfg.default_scope)
    loader = cfg.get(f"{part}_dataloader")
    if not loader:
        raise cli.UserError(f"the config has no {part}_dataloader")
    return DATASETS.build(loader.dataset)


def build_visualizer(cfg):
    """The config's visualizer without its backends: pictures go to files, and nothing else is logged."""
    from mmengine.registry import VISUALIZERS

    given = dict(cfg.get("visualizer") or {})
    defaults = dict(classification="UniversalVisualizer", detection="DetLocalVisualizer")
    given.setdefault("type", defaults.get(cli.task_of(cfg), "SegLocalVisualizer"))
    return VISUALIZERS.build(given | dict(vis_backends=None, name="browse_dataset"))


def picture_of(inputs, to_rgb: bool):
    """uint8 (H, W, 3) RGB of what the pipeline packs: a tensor (3, H, W), BGR unless the pipeline turned it around."""
    import numpy as np

    image = inputs.permute(1, 2, 0).numpy()
    if image.dtype != np.uint8:  # normalised by the pipeline itself
        low, high = float(image.min()), float(image.max())
        image = ((image - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    return np.ascontiguousarray(image if to_rgb else image[..., ::-1])


def loads_rgb(dataset) -> bool:
    """Whether the loading step of the pipeline already gives RGB."""
    while hasattr(dataset, "dataset") or hasattr(dataset, "datasets"):
        dataset = dataset.dataset if hasattr(dataset, "dataset") else dataset.datasets[0]
    steps = getattr(getattr(dataset, "pipeline", None), "transforms", ())
    return any(getattr(step, "color_type", "") in ("color_rgb", "rgb") for step in steps)


def draw(task: str, visualizer, dataset, item: dict, path: Path, to_rgb: bool) -> None:
    image, sample = picture_of(item["inputs"], to_rgb), item["data_samples"]
    if task == "classification":
        classes = dataset.metainfo.get("classes")
        longest = max(image.shape[:2])
        factor = max(1.0, 224 / longest)  # the text has to fit in
        visualizer.visualize_cls(image, sample, classes, rescale_factor=factor, out_file=str(path), name=path.stem)
        return
    boxes = sample.gt_instances.get("bboxes") if "gt_instances" in sample else None
    if hasattr(boxes, "tensor"):  # mmdet's visualizer takes plain tensors only
        sample.gt_instances.bboxes = boxes.tensor
    visualizer.dataset_meta = dataset.metainfo
    visualizer.add_datasample(path.stem, image, sample.cpu(), draw_pred=False, out_file=str(path))


def browse(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    if args.count < 1:
        raise cli.UserError(f"--count must be at least 1, got {args.count}")
    cfg = cli.load_config(args.config, args.cfg_options, args.data_root)
    task = cli.task_of(cfg)
    np.random.seed(args.seed)  # what the libraries' augmentations draw from
    torch.manual_seed(args.seed)
    dataset, visualizer = build_dataset(cfg, args.part), build_visualizer(cfg)
    if len(dataset) == 0:
        raise cli.UserError(f"the data set of {args.part}_dataloader is empty")
    args.out.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(args.seed).permutation(len(dataset)) if args.shuffle else np.arange(len(dataset))
    to_rgb, written = loads_rgb(dataset), 0
    for index in order[: args.count]:
        item = dataset[int(index)]
        name = Path(item["data_samples"].metainfo.get("img_path") or "sample").stem
        draw(task, visualizer, dataset, item, args.out / f"{int(index):06d}_{name}.png", to_rgb)
        written += 1
    print(f"{args.out}: {written} of {len(dataset)} samples of {type(dataset).__name__}")


def main(argv: Sequence[str] | None = None) -> int:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--part", choices=("train", "val", "test"), default="train", help="whose loader (train)")
    parser.add_argument("--count", type=int, default=20, help="samples to draw, at most (%(default)s)")
    parser.add_argument("--shuffle", action="store_true", help="draw some from everywhere instead of the first ones")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of random augmentations")
    parser.add_argument("--data-root", help="use this folder wherever the config names its data_root")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes, as dotted.key=value")
    args = parser.parse_args(argv)
    return cli.run_tool(lambda: browse(args))


if __name__ == "__main__":
    sys.exit(main())
