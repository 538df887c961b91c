"""Smoke run with the onedl packages: imports, registries, configs of the three libraries, one training iteration.

Runs in an environment that holds them (``.ci/onedl.sh`` makes it); the data are generated.
"""

import importlib.metadata
import tempfile
import time
from pathlib import Path

import mmvssm

CONFIGS = (
    "vmamba-tiny-s1l8_8xb128_in1k",
    "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco",
    "vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512",
)


def build_models() -> None:
    """One config per library parses and its model builds."""
    for name in CONFIGS:
        model = mmvssm.get_model(name)
        assert type(model.backbone).__module__.startswith("mmvssm."), type(model.backbone)
        print(f"built {name}: {type(model).__module__}.{type(model).__name__}")


def train_detector(folder: Path) -> None:
    """One iteration and validation of the demo's Mask R-CNN through the Runner, and its checkpoint read back."""
    import torch
    from mmengine.config import Config
    from mmengine.runner import Runner, load_checkpoint

    config = Config.fromfile(
        str(Path(mmvssm.__file__).parent / ".mim/configs/demo/mask-rcnn_vmamba-nano_fpn_shapes.py")
    )
    for loader, count in ((config.train_dataloader, 8), (config.val_dataloader, 4), (config.test_dataloader, 4)):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(folder / "shapes"), num_images=count)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(folder / "shapes/annotations/instances_val.json")
    config.train_cfg.update(max_iters=1, val_interval=1)
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint.interval = 1
    config.work_dir = str(folder / "run")
    runner = Runner.from_cfg(config)
    runner.train()
    loss = runner.message_hub.get_scalar("train/loss").current()
    assert 0 < loss < 1e3, loss
    trained = {name: value.clone() for name, value in runner.model.state_dict().items()}
    load_checkpoint(runner.model, str(folder / "run/iter_1.pth"))
    assert all(torch.equal(value, trained[name]) for name, value in runner.model.state_dict().items())
    print(f"one iteration of Mask R-CNN: loss {loss:.3f}; checkpoint read back")


def main() -> None:
    start = time.perf_counter()
    versions = {name: importlib.metadata.version(f"onedl-{name}") for name in ("mmengine", "mmcv", "mmdetection")}
    print("onedl:", versions)
    build_models()
    with tempfile.TemporaryDirectory() as folder:
        train_detector(Path(folder))
    print(mmvssm.compat.summary())
    print(f"onedl smoke run passed in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
