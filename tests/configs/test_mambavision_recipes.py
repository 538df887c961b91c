"""MambaVision's published settings: recipes, sizes, windows, drop path as really built."""

import math
import re

import pytest
import torch
import yaml
from torch import nn

from mmvssm import list_models
from tests.configs.conftest import CONFIGS, parsed

FOLDER = CONFIGS / "mambavision"
METAFILE = yaml.safe_load((FOLDER / "metafile.yml").read_text())["Models"]
# arch -> input size, shorter side after resizing, drop path, weight decay, warm-up epochs
CLASSIFIERS = {
    "t": (224, 224, 0.2, 0.05, 20),
    "t2": (224, 228, 0.2, 0.05, 20),
    "s": (224, 240, 0.2, 0.05, 20),
    "b": (224, 224, 0.3, 0.075, 35),
    "l": (224, 224, 0.3, 0.12, 20),
    "l2": (224, 224, 0.3, 0.12, 20),
    "b-21k": (224, 224, 0.3, 0.075, 35),
    "l-21k": (224, 224, 0.3, 0.12, 20),
    "l2-512-21k": (512, 550, 0.3, 0.12, 20),
    "l3-256-21k": (256, 256, 0.5, 0.12, 20),
    "l3-512-21k": (512, 550, 0.5, 0.12, 20),
}
# name -> arch, windows, learning rate, weight decay, images per GPU, whether in mixed precision
SEGMENTORS = {
    "mambavision-t_upernet_16xb1-amp-160k_ade20k-512x512": ("t", (64, 32), 5e-5, 0.01, 1, True),
    "mambavision-s_upernet_8xb2-amp-160k_ade20k-512x512": ("s", (160, 56), 6e-5, 0.01, 2, True),
    "mambavision-b_upernet_16xb1-amp-160k_ade20k-512x512": ("b", (64, 32), 5e-5, 0.01, 1, True),
    "mambavision-l3-512-21k_upernet_16xb1-160k_ade20k-640x640": ("l3-512-21k", (64, 32), 8e-5, 0.05, 1, False),
}
OURS = {
    stem: arch
    for arch in CLASSIFIERS
    for stem in (
        f"mask-rcnn_mambavision-{arch}_fpn_1x_coco",
        f"mask-rcnn_mambavision-{arch}_fpn_ms-crop-3x_coco",
        f"cascade-mask-rcnn_mambavision-{arch}_fpn_fit-ms-crop-3x_coco",
        f"mambavision-{arch}_upernet_8xb2-fit-{'' if arch.startswith('l3') else 'amp-'}160k_ade20k-512x512",
    )
}


def config(stem: str):
    return parsed(FOLDER / f"{stem}.py")


def stem_of(arch: str) -> str:
    size = CLASSIFIERS[arch][0]
    return f"mambavision-{arch}_32xb128_in1k" + (f"-{size}" if size != 224 else "")


def classification_file(arch: str) -> str:
    entry = next(entry for entry in METAFILE if entry["Name"] == stem_of(arch))
    return entry["Converted From"]["Weights"]


@pytest.mark.parametrize("arch", CLASSIFIERS)
def test_imagenet_recipe(arch):
    cfg = config(stem_of(arch))
    size, edge, drop_path, weight_decay, warmup_epochs = CLASSIFIERS[arch]
    assert cfg.model.backbone == dict(
        type="mmvssm.MambaVision", arch=arch, drop_path_rate=drop_path, out_indices=(3,), dt_init="zero"
    )
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay, optimizer.eps) == ("Lamb", 5e-3, weight_decay, 1e-8)
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
    assert cfg.optim_wrapper.paramwise_cfg == dict(preset="official")
    assert cfg.param_scheduler[0].end == warmup_epochs
    assert cfg.train_cfg.max_epochs == 320
    assert {hook.type: hook.get("momentum") for hook in cfg.custom_hooks} == {"EMAHook": 2e-4, "SyncBuffersHook": None}
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [("Mixup", 0.8), ("CutMix", 1.0)]
    train = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert (train["RandomResizedCrop"].scale, train["RandomResizedCrop"].interpolation) == (size, "bicubic")
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        resize, crop = loader.dataset.pipeline[1:3]
        assert crop == dict(type="CenterCrop", crop_size=size)
        assert (resize.backend, resize.interpolation) == ("pillow", "bicubic")
        if size == 512:  # squashed
            assert (resize.type, resize.scale) == ("Resize", (edge, edge))
            assert not resize.get("keep_ratio", False)
        else:
            assert (resize.type, resize.scale, resize.edge) == ("ResizeEdge", edge, "short")
        assert loader.batch_size == 128


@pytest.mark.parametrize("arch", ["t", "b"])
def test_learning_rate_of_the_classifiers(arch):
    """Linear warm-up from 1e-6, a cosine over 310 epochs that counts from the first, then the minimum."""
    from mmengine.optim import CosineAnnealingLR, LinearLR

    cfg, per_epoch = config(stem_of(arch)), 3
    warmup = CLASSIFIERS[arch][4]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-3)
    schedulers = []
    for kind, settings in zip((LinearLR, CosineAnnealingLR), cfg.param_scheduler, strict=True):
        settings = dict(settings)
        assert settings.pop("type") == kind.__name__
        assert settings.pop("convert_to_iter_based")
        schedulers.append(kind.build_iter_from_epoch(optimizer=optimizer, epoch_length=per_epoch, **settings))
    for step in range(320 * per_epoch):
        epoch, lr = step / per_epoch, optimizer.param_groups[0]["lr"]
        cosine = 5e-6 + (5e-3 - 5e-6) * (1 + math.cos(math.pi * min(epoch, 310) / 310)) / 2
        if epoch > warmup:
            assert lr == pytest.approx(cosine, rel=0.02)
        else:  # the product with the cosine, which has hardly begun
            assert lr == pytest.approx(1e-6 + (5e-3 - 1e-6) * epoch / warmup, rel=0.05, abs=2e-6)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-6, rel=0.01)


def test_optimiser_of_the_classifiers():
    """LAMB is built, and what the authors decayed is decayed: A_log, but nothing one-dimensional and no bias."""
    import copy

    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope

    from mmvssm.models import MambaVision

    cfg = config(stem_of("t"))
    model = nn.Module()
    model.backbone = MambaVision(dict(embed_dims=8, depths=(1, 1, 2, 2), layer_scale=1e-5), out_indices=(3,))
    model.head = nn.Module()
    model.head.fc = nn.Linear(64, 5)
    settings = copy.deepcopy(cfg.optim_wrapper)
    settings.type = "OptimWrapper"
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        import mmpretrain.engine  # noqa: F401

        wrapper = build_optim_wrapper(model, settings)
    assert type(wrapper.optimizer).__name__ == "Lamb"
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in wrapper.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert decayed == {n for n, p in model.named_parameters() if p.ndim > 1}
    assert "backbone.stages.2.blocks.0.mixer.A_log" in decayed


def test_weight_decay_of_the_dense_recipes():
    """Everything whose name in the authors' code lacks "norm": their stem's batch norms have other names."""
    import copy

    from mmengine.optim import build_optim_wrapper

    from mmvssm.models import MambaVision

    model = nn.Module()
    model.backbone = MambaVision(dict(embed_dims=8, depths=(1, 1, 2, 2), layer_scale=1e-5))
    settings = copy.deepcopy(config(next(iter(SEGMENTORS))).optim_wrapper)
    settings.type = "OptimWrapper"
    wrapper = build_optim_wrapper(model, settings)
    names = {id(p): n.removeprefix("backbone.") for n, p in model.named_parameters()}
    spared = {names[id(p)] for g in wrapper.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert spared == {n for n in names.values() if "norm" in n and not n.startswith("patch_embed.")}
    assert {"norm0.weight", "stages.0.blocks.0.norm1.bias", "stages.3.blocks.1.norm2.weight"} < spared


@pytest.mark.parametrize("arch", ["t", "s", "b"])
def test_cascade_recipe(arch):
    cfg = config(f"cascade-mask-rcnn_mambavision-{arch}_fpn_amp-ms-crop-3x_coco")
    check_published(cfg, arch, (112, 56))
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (
        2e-4 if arch == "b" else 1e-4,
        0.05,
    )
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, list(steps.milestones)) == (0.001, 1000, [27, 33])
    assert (cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size) == (36, 2)
    heads = cfg.model.roi_head.bbox_head
    assert [h.bbox_coder.target_stds[0] for h in heads] == [0.1, 0.05, 0.033]
    for head in heads:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ("ConvFCBBoxHead", 4, 1)
        assert (head.norm_cfg.type, head.reg_class_agnostic, head.reg_decoded_bbox) == ("SyncBN", False, True)
        assert head.loss_bbox == dict(type="GIoULoss", loss_weight=10.0)
    (single,), crop = cfg.train_dataloader.dataset.pipeline[3].transforms
    assert [s[0] for s in single.scales] == [*range(480, 801, 32)]
    assert (crop[1].crop_type, tuple(crop[1].crop_size)) == ("absolute_range", (384, 600))
    assert cfg.model.data_preprocessor.pad_size_divisor == 32


@pytest.mark.parametrize("stem", SEGMENTORS)
def test_published_upernet_recipe(stem):
    cfg = config(stem)
    arch, windows, lr, weight_decay, batch, amp = SEGMENTORS[stem]
    check_published(cfg, arch, windows)
    assert (cfg.optim_wrapper.type == "AmpOptimWrapper") == amp
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (lr, weight_decay)
    assert (cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size) == (batch, 16)
    warmup, poly = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (1e-6, 1500)
    assert (poly.power, poly.eta_min, poly.begin, poly.end) == (1.0, 0.0, 1500, 160000)
    side = 640 if "640x640" in stem else 512
    train = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert (tuple(train["RandomResize"].scale), tuple(train["RandomCrop"].crop_size)) == (
        (4 * side, side),
        (side, side),
    )
    assert (cfg.model.decode_head.channels, cfg.model.decode_head.num_classes) == (512, 150)
    assert (cfg.model.auxiliary_head.channels, cfg.model.auxiliary_head.loss_decode.loss_weight) == (256, 0.4)


def check_published(cfg, arch: str, windows: tuple[int, int]) -> None:
    """The drop path rate that was really built; batch norms that train; weight decay by the authors' names."""
    assert cfg.model.backbone == dict(
        type="mmvssm.MambaVision",
        arch=arch,
        window_size=windows,
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=classification_file(arch), prefix="backbone."),
    )
    assert cfg.optim_wrapper.get("clip_grad") is None
    assert cfg.optim_wrapper.paramwise_cfg == dict(preset="official")


@pytest.mark.parametrize("stem", OURS)
def test_our_dense_recipes(stem):
    cfg = config(stem)
    assert cfg.model.backbone == dict(
        type="mmvssm.MambaVision",
        arch=OURS[stem],
        window_size=(32, 16),
        fit_windows=True,
        drop_path_rate=CLASSIFIERS[OURS[stem]][2],
        norm_eval=True,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=classification_file(OURS[stem]), prefix="backbone."),
    )
    segmentor = "upernet" in stem
    lr, weight_decay = (6e-5, 0.01) if segmentor else (1e-4, 0.05)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (lr, weight_decay)
    assert (cfg.optim_wrapper.type == "AmpOptimWrapper") == ("amp-" in stem)
    assert cfg.optim_wrapper.paramwise_cfg == dict(preset="default")
    assert cfg.auto_scale_lr.base_batch_size == 16


def test_published_setting_is_found_first():
    """Ours with other windows must not be what a search for a variant's segmentor gives first."""
    for stem in SEGMENTORS:
        assert list_models(f"{stem.split('_')[0]}_upernet_*ade20k*")[0] == stem


def test_readme_links_exist():
    text = (FOLDER / "README.md").read_text()
    targets = re.findall(r"\]\((\.[^)]+)\)", text)
    assert [target for target in targets if not (FOLDER / target.partition("#")[0]).exists()] == []
