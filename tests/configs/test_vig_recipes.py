"""The settings of ViG and ViG-H: the authors' for ImageNet, our proposals elsewhere."""

import pytest
import yaml

from tests.configs.conftest import CONFIGS, parsed

FOLDER = CONFIGS / "vig"
METAFILE = yaml.safe_load((FOLDER / "metafile.yml").read_text())["Models"]
# name: class, GPUs x batch, peak lr, weight decay, drop path, width
CLASSIFIERS = {
    "vig-tiny": ("ViG", "8xb128", 2e-3, 0.05, 0.0, 192),
    "vig-small": ("ViG", "8xb128", 1e-3, 0.1, 0.2, 384),
    "vig-base": ("ViG", "16xb64", 2e-3, 0.05, 0.5, 768),
    "vigh-tiny": ("ViGH", "8xb128", 1.6e-3, 0.05, 0.2, 768),
    "vigh-small": ("ViGH", "8xb128", 1e-3, 0.05, 0.3, 768),
    "vigh-base": ("ViGH", "8xb128", 1e-3, 0.05, 0.6, 1024),
}
PYRAMIDS = {"vigh-tiny": 0.2, "vigh-small": 0.3, "vigh-base": 0.5}
# name: drop path; lr and weight decay of Mask R-CNN; lr and layer-wise decay of UperNet
PLAIN = {
    "vig-tiny": (0.1, 2e-4, 0.01, 12e-5, 0.95),
    "vig-small": (0.2, 1e-4, 0.05, 6e-5, 0.85),
    "vig-base": (0.3, 1e-4, 0.05, 6e-5, 0.8),
}

DETECTORS = ("mask-rcnn 1x", "mask-rcnn ms-crop-3x", "cascade-mask-rcnn ms-crop-3x")


def config(stem: str):
    return parsed(FOLDER / f"{stem}.py")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_imagenet_recipe(name):
    kind, batch, lr, weight_decay, drop_path, width = CLASSIFIERS[name]
    plain = kind == "ViG"
    cfg = config(f"{name}_{batch}_in1k")
    expected = dict(type=f"mmvssm.{kind}", arch=name.split("-")[1], drop_path_rate=drop_path)
    expected |= dict(img_size=224, out_indices=(11,)) if plain else dict(out_indices=(3,))
    assert cfg.model.backbone == expected
    assert cfg.model.head.in_channels == width
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eps) == (lr, weight_decay, 1e-8)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert cfg.optim_wrapper.type == ("OptimWrapper" if plain else "AmpOptimWrapper")
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
    warmup, cosine = cfg.param_scheduler
    assert warmup.start_factor * lr == pytest.approx(1e-6)
    assert (warmup.end, cosine.begin, cosine.end, cosine.eta_min) == (20, 20, 300, 1e-5)
    assert warmup.convert_to_iter_based
    assert cosine.convert_to_iter_based
    assert cfg.train_cfg.max_epochs == 300
    assert [hook.momentum for hook in cfg.custom_hooks if hook.type == "EMAHook"] == [1e-4]
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [("Mixup", 0.8), ("CutMix", 1.0)]
    train = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert (train["RandomResizedCrop"].scale, train["RandomResizedCrop"].interpolation) == (224, "bicubic")
    assert (train["RandAugment"].magnitude_level, train["RandAugment"].magnitude_std) == (9, 0.5)
    assert train["RandomErasing"].erase_prob == 0.25
    test = {t.type: t for t in cfg.test_dataloader.dataset.pipeline}
    assert (test["ResizeEdge"].scale, test["ResizeEdge"].interpolation) == (256, "bicubic")
    assert test["CenterCrop"].crop_size == 224


@pytest.mark.parametrize("name", ["vig-tiny", "vigh-tiny"])
def test_weight_decay_of_the_authors(name):
    """What is one-dimensional is left out; depthwise kernels and, in the plain family, pos_embed are decayed."""
    import torch
    from mmengine.optim import build_optim_wrapper

    from tests.configs.test_configs import build

    cfg = config(f"{name}_8xb128_in1k")
    wrapper = cfg.optim_wrapper.to_dict()
    wrapper["type"] = "OptimWrapper"
    model = build(cfg, "meta")
    optimizer = build_optim_wrapper(model, wrapper).optimizer
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    for key, parameter in model.named_parameters():
        assert (decay[id(parameter)] == 0) == (parameter.ndim <= 1), key


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_of_the_pyramids(name, kind):
    detector, schedule = kind.split()
    cfg = config(f"{detector}_{name}_fpn_{schedule}_coco")
    assert cfg.model.type == ("MaskRCNN" if detector == "mask-rcnn" else "CascadeRCNN")
    check_dense(cfg, name, "ViGH", PYRAMIDS[name], (0, 1, 2, 3))
    check_schedule(cfg, schedule)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.05)
    assert cfg.optim_wrapper.paramwise_cfg == dict(preset="default")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_of_the_plain_models(name, kind):
    detector, schedule = kind.split()
    drop_path, lr, weight_decay, _, _ = PLAIN[name]
    cfg = config(f"{detector}_{name}_simfpn_{schedule}_coco")
    assert cfg.model.type == ("MaskRCNN" if detector == "mask-rcnn" else "CascadeRCNN")
    check_dense(cfg, name, "ViG", drop_path, (11,))
    check_schedule(cfg, schedule)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (lr, weight_decay)
    assert cfg.optim_wrapper.paramwise_cfg == dict(preset="default", layer_decay_rate=0.85)
    assert cfg.model.neck.type == "mmvssm.SimpleFeaturePyramid"


@pytest.mark.parametrize("name", [*PYRAMIDS, *PLAIN])
def test_upernet(name):
    cfg = config(f"{name}_upernet_4xb4-160k_ade20k-512x512")
    paramwise = dict(preset="default")
    if name in PYRAMIDS:
        check_dense(cfg, name, "ViGH", PYRAMIDS[name], (0, 1, 2, 3))
        assert cfg.model.test_cfg.mode == "whole"
        lr = 6e-5
    else:
        drop_path, _, _, lr, layer_decay = PLAIN[name]
        check_dense(cfg, name, "ViG", drop_path, (2, 5, 8, 11), img_size=512)
        assert cfg.model.test_cfg == dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
        assert cfg.model.neck.type == "mmvssm.DeconvPyramid"
        paramwise["layer_decay_rate"] = layer_decay
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (lr, 0.01)
    assert cfg.optim_wrapper.paramwise_cfg == paramwise
    warmup, poly = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (1e-6, 1500)
    assert (poly.power, poly.eta_min, poly.begin, poly.end) == (1.0, 0.0, 1500, 160000)
    assert cfg.train_cfg.max_iters == 160000
    assert (cfg.model.decode_head.channels, cfg.model.decode_head.num_classes) == (512, 150)
    assert (cfg.model.auxiliary_head.in_index, cfg.model.auxiliary_head.loss_decode.loss_weight) == (2, 0.4)


def check_schedule(cfg, schedule: str) -> None:
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 1000, False)
    assert list(steps.milestones) == ([8, 11] if schedule == "1x" else [27, 33])
    assert steps.end == cfg.train_cfg.max_epochs
    assert cfg.model.data_preprocessor.pad_size_divisor == 32


def check_dense(cfg, name: str, kind: str, drop_path: float, out_indices: tuple, **more) -> None:
    backbone = dict(cfg.model.backbone)
    init = backbone.pop("init_cfg")
    arch = name.split("-")[1]
    expected = dict(type=f"mmvssm.{kind}", arch=arch, drop_path_rate=drop_path, out_indices=out_indices, **more)
    assert backbone == expected
    entry = next(entry for entry in METAFILE if entry["Name"].startswith(f"{name}_"))
    assert init == dict(type="Pretrained", checkpoint=entry["Converted From"]["Weights"], prefix="backbone.")
    assert cfg.auto_scale_lr.base_batch_size == 16
