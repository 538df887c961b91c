"""The published settings: recipes, drop path rates."""

import functools
import re

import pytest
import yaml

from tests.configs.conftest import CONFIGS, parsed

FOLDER = CONFIGS / "vmamba"
METAFILE = yaml.safe_load((FOLDER / "metafile.yml").read_text())["Models"]
ARCHS = (
    "tiny-s1l8",
    "tiny-s2l5",
    "small-s1l20",
    "small-s2l15",
    "base-s1l20",
    "base-s2l15",
    "tiny-0220",
    "v0-tiny",
    "v0-small",
    "v0-base",
)
CLASSIFICATION_DROP_PATH = {
    "tiny-s1l8": 0.2,
    "tiny-s2l5": 0.2,
    "small-s1l20": 0.3,
    "small-s2l15": 0.3,
    "base-s1l20": 0.5,
    "base-s2l15": 0.6,
    "tiny-0220": 0.2,
    "v0-tiny": 0.1,
    "v0-small": 0.3,
    "v0-base": 0.6,
}


def dense_drop_path(arch: str, v0: float) -> float:
    return v0 if arch.startswith("v0") else {"tiny": 0.2, "small": 0.3, "base": 0.6}[arch.split("-")[0]]


def config(stem: str):
    return parsed(FOLDER / f"{stem}.py")


@pytest.mark.parametrize("arch", ARCHS)
def test_imagenet_recipe(arch):
    cfg = config(f"vmamba-{arch}_8xb128_in1k")
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert cfg.model.backbone == dict(
        type="mmvssm.VMamba", arch=arch, drop_path_rate=CLASSIFICATION_DROP_PATH[arch], out_indices=(3,)
    )
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eps) == (1e-3, 0.05, 1e-8)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
    assert cfg.optim_wrapper.paramwise_cfg == dict(preset="official")
    warmup, cosine = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, cosine.begin, cosine.end, cosine.eta_min) == (1e-3, 20, 20, 300, 1e-5)
    assert warmup.convert_to_iter_based
    assert cosine.convert_to_iter_based
    assert cfg.train_cfg.max_epochs == 300
    averages = [hook for hook in cfg.custom_hooks if hook.type == "EMAHook"]
    assert [hook.momentum for hook in averages] == ([] if arch == "v0-tiny" else [1e-4])
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [("Mixup", 0.8), ("CutMix", 1.0)]
    train = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert (train["RandomResizedCrop"].scale, train["RandomResizedCrop"].interpolation) == (224, "bicubic")
    assert (train["RandAugment"].magnitude_level, train["RandAugment"].magnitude_std) == (9, 0.5)
    assert train["RandomErasing"].erase_prob == 0.25
    test = {t.type: t for t in cfg.test_dataloader.dataset.pipeline}
    assert (test["ResizeEdge"].scale, test["ResizeEdge"].interpolation, test["CenterCrop"].crop_size) == (
        256,
        "bicubic",
        224,
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["mask-rcnn 1x", "mask-rcnn ms-crop-3x", "cascade-mask-rcnn ms-crop-3x"])
def test_detection_recipe(arch, kind):
    detector, schedule = kind.split()
    cfg = config(f"{detector}_vmamba-{arch}_fpn_{schedule}_coco")
    assert cfg.model.type == ("MaskRCNN" if detector == "mask-rcnn" else "CascadeRCNN")
    check_dense(cfg, arch, dense_drop_path(arch, 0.2))
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.05)
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 1000, False)
    assert list(steps.milestones) == ([8, 11] if schedule == "1x" else [27, 33])
    assert steps.end == cfg.train_cfg.max_epochs
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    transforms = [t.type for t in cfg.train_dataloader.dataset.pipeline]
    assert ("RandomChoice" in transforms) == (schedule != "1x")
    if schedule != "1x":
        single, crop = cfg.train_dataloader.dataset.pipeline[3].transforms
        assert [s[0] for s in single[0].scales] == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
        assert [s[0] for s in crop[0].scales] == [400, 500, 600]
        assert (crop[1].crop_type, tuple(crop[1].crop_size)) == ("absolute_range", (384, 600))


@pytest.mark.parametrize("arch", ARCHS)
def test_upernet_recipe(arch):
    cfg = config(f"vmamba-{arch}_upernet_4xb4-160k_ade20k-512x512")
    check_dense(cfg, arch, dense_drop_path(arch, 0.3))
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (6e-5, 0.01)
    warmup, poly = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (1e-6, 1500)
    assert (poly.power, poly.eta_min, poly.begin, poly.end) == (1.0, 0.0, 1500, 160000)
    assert cfg.train_cfg.max_iters == 160000
    assert (cfg.model.decode_head.channels, cfg.model.decode_head.num_classes) == (512, 150)
    assert (cfg.model.auxiliary_head.channels, cfg.model.auxiliary_head.loss_decode.loss_weight) == (256, 0.4)


def check_dense(cfg, arch: str, drop_path: float) -> None:
    backbone = dict(cfg.model.backbone)
    init = backbone.pop("init_cfg")
    assert backbone == dict(type="mmvssm.VMamba", arch=arch, drop_path_rate=drop_path, out_indices=(0, 1, 2, 3))
    assert init == dict(type="Pretrained", checkpoint=classification_file(arch), prefix="backbone.")
    assert cfg.optim_wrapper.get("clip_grad") is None
    assert cfg.optim_wrapper.paramwise_cfg == dict(preset="official")
    assert cfg.auto_scale_lr.base_batch_size == 16


@functools.cache
def classification_file(arch: str) -> str:
    entry = next(entry for entry in METAFILE if entry["Name"] == f"vmamba-{arch}_8xb128_in1k")
    return entry["Converted From"]["Weights"]


def test_readme_links_exist():
    text = (FOLDER / "README.md").read_text()
    targets = re.findall(r"\]\((\.[^)]+)\)", text)
    assert len(targets) > 40
    assert [target for target in targets if not (FOLDER / target).exists()] == []
    listed = {target.split("/")[-1] for target in targets}
    with_results = {entry["Config"].split("/")[-1] for entry in METAFILE}
    assert with_results <= listed
