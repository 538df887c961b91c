"""Trains a small VMamba Mask R-CNN on generated shapes, evaluates it and draws what it finds.

Nothing is downloaded. It is an ordinary run of configs/demo/mask-rcnn_vmamba-nano_fpn_shapes.py, which works with
tools/train.py too; what this script adds is a progress display, a summary and a picture.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Waiting threads give up their core. Otherwise any other work on a small machine (the data loader is enough) can slow
# training down several times. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli

# isort: split
import cv2
import mmengine.device.utils
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo" / "mask-rcnn_vmamba-nano_fpn_shapes.py"
SCORE_THRESHOLD = 0.5  # of the instances that are drawn
PICTURE_ROWS, PICTURE_PAIRS = 3, 2


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def seed_int(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", default="work_dirs/demo", help="folder for everything written (%(default)s)")
    parser.add_argument("--iters", type=positive_int, help="training iterations; the schedule is stretched to fit")
    parser.add_argument("--seed", type=seed_int, help="seed of the weights and of the order of the images")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="change the config, as dotted.key=value")
    return parser.parse_args(argv)


def configure(args: argparse.Namespace) -> Config:
    """The demo's config with the command line's changes: iterations, seed, device, folders."""
    cfg = cli.load_config(str(CONFIG), args.cfg_options, data_root=str(Path(args.work_dir) / "data"))
    cfg.work_dir = args.work_dir
    if args.iters is not None:
        set_iterations(cfg, args.iters)
    if args.seed is not None:
        cfg.randomness.seed = args.seed

    if args.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: torch finds no CUDA GPU here; leave --device out to train on the CPU")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    # MMEngine has no setting for the device; its get_device() returns this variable.
    mmengine.device.utils.DEVICE = device
    if device == "cuda" and cfg.optim_wrapper.type == "OptimWrapper":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    return cfg


def set_iterations(cfg: Config, iters: int) -> None:
    """Trains for ``iters`` iterations and stretches the learning rate schedule accordingly."""
    factor = iters / cfg.train_cfg.max_iters
    cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = cfg.default_hooks.checkpoint.interval = iters
    for scheduler in cfg.param_scheduler:
        scheduler.begin = int(scheduler.begin * factor)
        scheduler.end = max(scheduler.begin + 1, int(scheduler.end * factor))


class DemoProgress(Hook):
    """Shows a bar while training and evaluating (lines, where output is no terminal); keeps metrics and durations.

    Args:
        console: Where to print.
    """

    priority = "LOWEST"

    def __init__(self, console: Console) -> None:
        self.console = console
        self.metrics: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._loss = float("nan")
        self._bar: Progress | None = None

    def before_train(self, runner: Runner) -> None:
        self._open("training", runner.max_iters)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        loss = outputs["loss"].item()
        self._loss = loss if runner.iter == 0 else 0.9 * self._loss + 0.1 * loss
        self._advance(runner.iter + 1, f"loss {self._loss:.3f}")
        if runner.iter + 1 == runner.max_iters:
            self.close()

    def before_val(self, runner: Runner) -> None:
        self._open("evaluating", len(runner.val_dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._advance(batch_idx + 1, "")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metrics = dict(metrics or {})

    def after_val(self, runner: Runner) -> None:
        self.close()

    def _open(self, what: str, total: int) -> None:
        self._what, self._total, self._start = what, total, time.perf_counter()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, note="")

    def _advance(self, done: int, note: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif done * 10 // self._total > (done - 1) * 10 // self._total:
            elapsed = time.perf_counter() - self._start
            left = elapsed / done * (self._total - done)
            self.console.print(f"{self._what} {done}/{self._total}  {note}  {elapsed:.0f} s, {left:.0f} s left")

    def close(self) -> None:
        """Ends the bar that is shown."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self.seconds[self._what] = time.perf_counter() - self._start


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Sends what libraries print to a file. It stays open, because loggers made meanwhile keep writing to it."""
    stream = log.open("w", buffering=1)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


def draw_instances(axes, image: np.ndarray, title: str, instances: list[tuple], classes: Sequence, palette) -> None:
    """Draws (label, box as x1 y1 x2 y2, mask (H, W) bool, caption) of every instance over an RGB image."""
    height, width = image.shape[:2]
    shown = image.astype(np.float32) / 255
    shown = 0.25 + 0.75 * shown.mean(axis=2, keepdims=True).repeat(3, axis=2)  # grey, so that only masks have colour
    for label, _, mask, _ in instances:
        shown[mask] = 0.45 * shown[mask] + 0.55 * np.array(palette[label]) / 255
    axes.imshow(np.clip(shown, 0, 1), extent=(0, width, height, 0), interpolation="bilinear")
    for label, (x1, y1, x2, y2), mask, caption in instances:
        colour = np.array(palette[label]) / 255
        for contour in cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]:
            axes.fill(*(contour[:, 0].T + 0.5), fill=False, edgecolor=colour, linewidth=1)
        axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, linewidth=1)
        axes.text(
            np.clip(x1, 0, width - 4),
            np.clip(y1, 10, height),
            caption or classes[label],
            fontsize=6.5,
            color="white",
            verticalalignment="bottom",
            bbox=dict(facecolor=colour, edgecolor="none", pad=0.8),
        )
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def draw_predictions(runner: Runner, path: Path) -> None:
    """Draws the first validation images: ground truth on the left, predictions on the right of each pair."""
    dataset = runner.val_dataloader.dataset
    classes, palette = dataset.metainfo["classes"], dataset.metainfo["palette"]
    count = min(PICTURE_ROWS * PICTURE_PAIRS, len(dataset))
    runner.model.eval()
    with torch.no_grad():
        samples = runner.model.test_step(pseudo_collate([dataset[index] for index in range(count)]))

    figure = Figure(figsize=(2.6 * 2 * PICTURE_PAIRS, 2.8 * PICTURE_ROWS), dpi=90, layout="constrained")
    grid = figure.subplots(PICTURE_ROWS, 2 * PICTURE_PAIRS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, sample in enumerate(samples):
        image = cv2.cvtColor(cv2.imread(sample.img_path), cv2.COLOR_BGR2RGB)
        truth = [
            (item["bbox_label"], item["bbox"], coco_mask.decode(item["mask"]).astype(bool), "")
            for item in dataset.get_data_info(index)["instances"]
        ]
        found = sample.pred_instances
        found = found[found.scores >= SCORE_THRESHOLD].cpu().numpy()
        predictions = [
            (label, box, mask.astype(bool), f"{classes[label]} {score:.2f}")
            for label, box, mask, score in zip(found.labels, found.bboxes, found.masks, found.scores, strict=True)
        ]
        row, pair = divmod(index, PICTURE_PAIRS)
        for axes, title, instances in zip(
            grid[row, 2 * pair : 2 * pair + 2], ("ground truth", "prediction"), (truth, predictions), strict=True
        ):
            axes.set_axis_on()
            draw_instances(axes, image, title, instances, classes, palette)
    figure.savefig(path)


def demo(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    # Bound to today's stdout: what libraries print is redirected below.
    console = Console(file=sys.stdout, highlight=False)
    cfg = configure(args)
    work_dir = Path(cfg.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    picture, log = work_dir / "predictions.jpg", work_dir / "console.log"
    device, iters = mmengine.device.get_device(), cfg.train_cfg.max_iters
    console.print(f"VMamba Mask R-CNN on generated shapes, {iters} iterations on {device}; log: {log}", soft_wrap=True)
    console.print("writing the images and building the model ...")

    progress = DemoProgress(console)
    with quiet(log):
        runner = cli.build_runner(cfg)
        cli.watch(runner)
        runner.register_hook(progress)
        try:
            runner.train()
        finally:
            progress.close()
        draw_predictions(runner, picture)

    seconds = {**progress.seconds, "everything": time.perf_counter() - start}
    (work_dir / "demo.json").write_text(json.dumps(dict(metrics=progress.metrics, seconds=seconds), indent=2))
    report(console, progress.metrics, seconds, len(runner.val_dataloader.dataset))
    console.print(f"Picture:    {picture}\nCheckpoint: {(work_dir / 'last_checkpoint').read_text()}", soft_wrap=True)


def report(console: Console, metrics: dict[str, float], seconds: dict[str, float], num_images: int) -> None:
    """Prints the table of results."""
    if not metrics:
        console.print("Nothing was detected on the validation images: train for longer (--iters).")
    else:
        console.print(f"COCO metrics on {num_images} validation images:")
        table = Table()
        for name in ("", "AP", "AP50", "AP75"):
            table.add_column(name, justify="right")
        for name, key in (("box", "coco/bbox_mAP"), ("mask", "coco/segm_mAP")):
            table.add_row(name, *(f"{metrics[key + threshold]:.3f}" for threshold in ("", "_50", "_75")))
        console.print(table)
    console.print("Seconds:    " + ", ".join(f"{what} {value:.0f}" for what, value in seconds.items()))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return cli.run_tool(lambda: demo(args))
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
