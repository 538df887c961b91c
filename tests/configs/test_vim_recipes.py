"""The settings of Vim: the authors' recipes, and what is ours."""

import re

import pytest
import yaml
from mmengine.optim import build_optim_wrapper

from tests.configs.conftest import CONFIGS, config_files, parsed

FOLDER = CONFIGS / "vim"
METAFILE = yaml.safe_load((FOLDER / "metafile.yml").read_text())["Models"]
WIDTHS = {"tiny": 192, "small": 384, "base": 768}
# name: file, arch, batch, weight decay, drop path of the arch
CLASSIFIERS = {
    "vim-tiny_8xb128_in1k": ("tiny", 1024, 0.1, 0.0),
    "vim-small_8xb64_in1k": ("small", 512, 0.05, 0.05),
    "vim-base_8xb64_in1k": ("base", 512, 0.05, 0.05),
}
FINE_TUNED = {"vim-tiny-plus_8xb128_in1k": "tiny-plus", "vim-small-plus_8xb128_in1k": "small-plus"}


def config(stem: str):
    return parsed(FOLDER / f"{stem}.py")


def released(arch: str) -> str:
    """The authors' file of an arch, from the metafile."""
    entry = next(e for e in METAFILE if e["Name"].startswith(f"vim-{arch}_"))
    return entry["Converted From"]["Weights"]


def groups(cfg) -> dict[str, tuple[float, float]]:
    """Name -> learning rate as a factor of the base rate, and weight decay, of all parameters."""
    from tests.configs.test_configs import build

    model = build(cfg, "meta")
    wrapper = cfg.optim_wrapper.to_dict()
    wrapper["type"] = "OptimWrapper"
    base = wrapper["optimizer"]["lr"]
    optimizer = build_optim_wrapper(model, wrapper).optimizer
    settings = {id(p): (g["lr"] / base, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: settings[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("stem", CLASSIFIERS)
def test_imagenet_recipe(stem):
    arch, batch, weight_decay, drop_path = CLASSIFIERS[stem]
    cfg = config(stem)
    assert cfg.model.backbone == dict(
        type="mmvssm.Vim", arch=arch, out_type="cls_token", drop_path_rate=drop_path, out_indices=(23,)
    )
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eps) == (1e-3, weight_decay, 1e-8)
    assert cfg.auto_scale_lr.base_batch_size == batch
    assert cfg.optim_wrapper.get("type", "OptimWrapper") == "OptimWrapper"
    assert "clip_grad" not in cfg.optim_wrapper
    warmup, cosine = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, cosine.begin, cosine.end, cosine.eta_min) == (1e-3, 5, 5, 300, 1e-5)
    assert cfg.train_cfg.max_epochs == 300
    assert cfg.train_dataloader.sampler == dict(type="RepeatAugSampler", num_repeats=3)
    (average,) = [hook for hook in cfg.custom_hooks if hook.type == "EMAHook"]
    assert (average.momentum, average.evaluate_on_ema, average.evaluate_on_origin) == (4e-5, False, True)
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [("Mixup", 0.8), ("CutMix", 1.0)]
    assert cfg.model.head.loss.label_smooth_val == 0.1
    train = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert (train["RandAugment"].magnitude_level, train["RandAugment"].magnitude_std) == (9, 0.5)
    assert train["RandomErasing"].erase_prob == 0.25


@pytest.mark.parametrize("stem", FINE_TUNED)
def test_fine_tuning_recipe(stem):
    cfg, arch = config(stem), FINE_TUNED[stem]
    assert cfg.model.backbone.arch == arch
    assert cfg.model.backbone.init_cfg.checkpoint == released(arch.removesuffix("-plus"))
    assert cfg.model.backbone.drop_path_rate == 0
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-5, 1e-8)
    assert [s.type for s in cfg.param_scheduler] == ["ConstantLR"]
    assert cfg.train_cfg.max_epochs == 30


def test_weight_decay_of_the_authors_classifiers():
    """Vectors, biases and embeddings are left out; decays and kernels are not."""
    for name, (rate, decay) in groups(config("vim-tiny_8xb128_in1k")).items():
        leaf = name.rpartition(".")[2]
        spared = {"cls_token", "pos_embed", "D", "conv_bias", "dt_proj_bias", "bias"}
        expected = 0.0 if leaf in spared or name.endswith("norm.weight") else 0.1
        assert (rate, decay) == (1.0, expected), name


@pytest.mark.parametrize(
    ("arch", "lr", "weight_decay", "rate"), [("tiny", 2e-4, 0.1, 0.92), ("small", 1e-4, 0.05, 0.95)]
)
def test_segmentation_recipe_of_the_authors(arch, lr, weight_decay, rate):
    cfg = config(f"vim-{arch}_upernet_4xb8-60k_ade20k-512x512")
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (lr, weight_decay)
    warmup, poly = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (1e-6, 1500)
    assert (poly.power, poly.eta_min, poly.begin, poly.end) == (1.0, 0.0, 1500, 60000)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (60000, 1000)
    assert cfg.model.test_cfg == dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
    # The groups that their code makes: only the stem has a lower rate, and only vectors are not decayed.
    for name, (factor, decay) in groups(cfg).items():
        stem = name.startswith(("backbone.patch_embed", "backbone.pos_embed"))
        vector = ("norm" in name and "weight" in name) or name.rpartition(".")[2] in (
            "bias",
            "conv_bias",
            "dt_proj_bias",
            "D",
        )
        vector = vector or bool(re.search(r"\.(bn|levels\.0\.1)\.weight", name))
        assert factor == pytest.approx(rate**25 if stem else 1.0), name
        assert decay == (0.0 if vector else weight_decay), name


def dense_backbone(arch: str, **options) -> dict:
    return dict(
        type="mmvssm.Vim",
        arch=arch,
        with_cls_token=False,
        out_norm=None,
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint=released(arch), prefix="backbone."),
        **options,
    )


@pytest.mark.parametrize("arch", WIDTHS)
@pytest.mark.parametrize("schedule", ["4xb4-160k", "4xb8-60k"])
def test_segmentors(arch, schedule):
    stem = f"vim-{arch}_upernet_{schedule}_ade20k-512x512"
    if (arch, schedule) == ("base", "4xb8-60k"):
        assert not (FOLDER / f"{stem}.py").exists()
        return
    cfg = config(stem)
    options = dict(img_size=512, out_indices=(5, 11, 17, 23), residual_in_fp32=arch != "tiny")
    options["feature"] = "mixer" if arch == "tiny" else "stream"
    if arch != "tiny":
        options |= dict.fromkeys(("rope", "rope_residual"), arch == "small")
    assert cfg.model.backbone == dense_backbone(arch, **options)
    assert cfg.model.neck == dict(type="mmvssm.DeconvPyramid", in_channels=[WIDTHS[arch]] * 4)
    assert cfg.model.decode_head.channels == min(WIDTHS[arch], 512)
    assert (cfg.model.decode_head.num_classes, cfg.model.auxiliary_head.channels) == (150, 256)
    assert cfg.model.auxiliary_head.loss_decode.loss_weight == 0.4


def test_tiny_segmentor_has_the_parameters_of_the_authors_log():
    """Theirs counts the unused norm, and a position embedding for 1024 pixels."""
    from mmvssm.analysis import count_parameters
    from tests.configs.test_configs import build

    model = build(config("vim-tiny_upernet_4xb8-60k_ade20k-512x512"), "meta")
    assert count_parameters(model) + 192 + (64**2 - 32**2) * 192 == 12_901_100


@pytest.mark.parametrize("arch", WIDTHS)
@pytest.mark.parametrize(
    "name",
    [
        "mask-rcnn_vim-{}_simfpn_1x_coco",
        "mask-rcnn_vim-{}_simfpn_ms-crop-3x_coco",
        "cascade-mask-rcnn_vim-{}_simfpn_ms-crop-3x_coco",
        "cascade-mask-rcnn_vim-{}_simfpn_amp-lsj-100e_coco",
    ],
)
def test_detectors(name, arch):
    if "lsj" in name and arch == "base":
        assert not (FOLDER / f"{name.format(arch)}.py").exists()
        return
    cfg = config(name.format(arch))
    options = dict(img_size=1024, out_indices=(23,))
    if name.startswith("cascade"):
        options |= dict(rope=True, rope_residual=True)
    assert cfg.model.backbone == dense_backbone(arch, **options)
    assert cfg.model.neck == dict(type="mmvssm.SimpleFeaturePyramid", in_channels=[WIDTHS[arch]])


@pytest.mark.parametrize(("arch", "rate"), [("tiny", 0.7), ("small", 0.837)])
def test_detection_recipe_of_the_authors(arch, rate):
    cfg = config(f"cascade-mask-rcnn_vim-{arch}_simfpn_amp-lsj-100e_coco")
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.1)
    assert cfg.train_cfg.max_iters == 184375
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, list(steps.milestones)) == (0.001, 250, [163889, 177546])
    assert (cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size) == (8, 64)
    train = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert (tuple(train["RandomResize"].scale), tuple(train["RandomResize"].ratio_range)) == ((1024, 1024), (0.1, 2.0))
    assert tuple(train["RandomCrop"].crop_size) == (1024, 1024)
    test = {t.type: t for t in cfg.test_dataloader.dataset.pipeline}
    assert tuple(test["Pad"].size) == tuple(test["Resize"].scale) == (1024, 1024)
    # Norms outside the blocks and the position embedding are not decayed, everything else is.
    for name, (factor, decay) in groups(cfg).items():
        block = re.match(r"backbone\.layers\.(\d+)\.", name)
        depth = int(block[1]) + 1 if block else 0 if name.startswith("backbone.") else 25
        assert factor == pytest.approx(rate ** (25 - depth)), name
        norm = re.search(r"norm\.(weight|bias)|\.ln\.|levels\.0\.1\.", name) and not block
        assert decay == (0.0 if norm or name == "backbone.pos_embed" else 0.1), name


def test_heads_of_the_authors_detector():
    from mmvssm.models.layers import LayerNorm2d
    from tests.configs.test_configs import build

    model = build(config("cascade-mask-rcnn_vim-tiny_simfpn_amp-lsj-100e_coco"), "meta")
    assert len(model.rpn_head.rpn_conv) == 2
    for head, deviation in zip(model.roi_head.bbox_head, (0.1, 0.05, 0.033), strict=True):
        assert len(head.shared_convs) == 4
        assert all(isinstance(conv.norm, LayerNorm2d) for conv in head.shared_convs)
        assert head.shared_fcs[0].out_features == 1024
        assert head.reg_class_agnostic
        assert head.bbox_coder.stds[0] == deviation
    for head in model.roi_head.mask_head:
        assert len(head.convs) == 4
        assert all(isinstance(conv.norm, LayerNorm2d) for conv in head.convs)


def test_metafile_covers_the_classifiers_and_readme_links_exist():
    names = [entry["Name"] for entry in METAFILE]
    assert sorted(names) == sorted(f.stem for f in config_files("vim") if f.stem.endswith("in1k"))
    text = (FOLDER / "README.md").read_text()
    targets = re.findall(r"\]\((\./[^)#]+)\)", text)
    assert [target for target in targets if not (FOLDER / target).exists()] == []
