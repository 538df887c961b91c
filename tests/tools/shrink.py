"""Options that shrink any config of this repository until an iteration takes a fraction of a second on a CPU.

They are what ``--cfg-options`` takes: dotted keys and values. In the tables a key may hold wildcards, which stand for
all settings of the config that match. A network becomes a few blocks of its own kind, heads become narrow, images an
eighth as large; what a config is about (parts, pipeline steps, losses, optimiser, schedule, hooks) stays as it is.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from tests.configs.conftest import parsed

WIDTH = 32  # of heads, which may have 32 groups of channels


def eighth(value: Any) -> Any:
    """A size of images, or sizes in any nesting, divided by eight, but not below 32; small ones stay."""
    if isinstance(value, list | tuple):
        return type(value)(map(eighth, value))
    return value if value <= 128 else max(32, value // 8)


def on_cpu(kind: str) -> str:
    """MMEngine's mixed precision asks for a GPU; here float16 becomes the bfloat16 of CPUs."""
    return "Bfloat16OptimWrapper" if kind == "AmpOptimWrapper" else kind


SIZES = {
    "*_dataloader.*dataset.pipeline.*.scale": eighth,
    "*_dataloader.*dataset.pipeline.*.scales": eighth,
    "*_dataloader.*dataset.pipeline.*.crop_size": eighth,
    "*_dataloader.*dataset.pipeline.*.size": eighth,
    "model.backbone.img_size": eighth,
    "model.data_preprocessor.size": eighth,
    "model.data_preprocessor.batch_augments.*.size": eighth,
    "model.test_cfg.crop_size": eighth,
    "model.test_cfg.stride": eighth,
}
LENGTH = {
    "train_dataloader.batch_size": 2,  # batch norms of maps of one pixel need two images
    "*_dataloader.num_workers": 0,
    "*_dataloader.persistent_workers": False,
    "*_dataloader.dataset.num_images": 2,
    "train_cfg.max_epochs": 1,
    "train_cfg.max_iters": 1,
    "default_hooks.logger.interval": 1,
}
HEADS = {
    "model.neck.out_channels": WIDTH,
    "model.rpn_head.*_channels": WIDTH,
    "model.roi_head.*_channels": WIDTH,
    "model.roi_head.*num_shared_convs": 1,
    "model.roi_head.mask_head.num_convs": 1,
    "model.train_cfg.rpn_proposal.nms_pre": 20,
    "model.train_cfg.rpn_proposal.max_per_img": 20,
    "model.train_cfg.rcnn*sampler.num": 16,
    "model.test_cfg.rpn.nms_pre": 20,
    "model.test_cfg.rpn.max_per_img": 20,
    "model.test_cfg.rcnn.score_thr": 0.0,  # so that an untrained network has masks to predict
    "model.test_cfg.rcnn.max_per_img": 5,
    "model.decode_head.channels": WIDTH,
    "model.auxiliary_head.channels": WIDTH,
}
TABLE = {**SIZES, **LENGTH, **HEADS, "optim_wrapper.type": on_cpu}

# Family -> what replaces the size of a variant; everything else of its arch stays.
ARCHS = {
    "VMamba": dict(embed_dims=8, depths=(1, 1, 1, 1)),
    # A convolutional block in each of the first stages, a scan and attention in each of the others.
    "MambaVision": dict(embed_dims=8, depths=(1, 1, 2, 2), stem_dims=8, num_heads=(2, 4)),
    "ViGH": dict(embed_dims=8, depths=(1, 1, 1, 1), head_dims=4, mlp_multiple=8),
    "ViG": dict(embed_dims=8, depth=4, head_dims=4, mlp_multiple=8),
    "Vim": dict(embed_dims=16, depth=4),
}


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):
    """What AmpOptimWrapper does with bfloat16 on a GPU, on a CPU. There is no loss to be scaled."""

    def __init__(self, loss_scale: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def optim_context(self, model: torch.nn.Module):
        return torch.autocast("cpu", dtype=torch.bfloat16)


def options(cfg: Config) -> dict[str, Any]:
    """Dotted key -> value for everything that has to change in ``cfg``."""
    found = _backbone_options(cfg.model)
    for key, value in _settings(cfg.to_dict()):
        for pattern, new in TABLE.items():
            if fnmatchcase(key, pattern):
                found[key] = new(value) if callable(new) else new
    schedulers = cfg.get("param_scheduler") or []
    for number, scheduler in enumerate(schedulers if isinstance(schedulers, list) else []):
        if "end" not in scheduler:  # it ends with the run
            found[f"param_scheduler.{number}.begin"] = 0
    return found


def shrunk(cfg: Config) -> Config:
    """A copy of ``cfg`` with :func:`options` applied as the tools apply ``--cfg-options``."""
    copy = Config(cfg.to_dict(), format_python_code=False)
    copy.merge_from_dict(options(cfg))
    return copy


def flags(file: str | Path) -> list[str]:
    """:func:`options` for a config file, as words of a command line after ``--cfg-options``."""
    words = []
    for key, value in options(parsed(Path(file))).items():
        for name, item in _settings(value, key) if isinstance(value, dict) else [(key, value)]:
            words.append(f"{name}={item}".replace(" ", ""))
    return words


def _settings(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting that holds no further ones."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
            yield from _settings(value, key)
        else:
            yield key, value


def _backbone_options(model: Any) -> dict[str, Any]:
    """A small network of the same variant, and the widths that necks and heads see of it."""
    from mmvssm.registry import MODELS

    backbone = model.backbone
    if backbone.type == "SwinTransformer":
        return _swin_options(model)
    family = MODELS.get(backbone.type)
    given = dict(family.arch_zoo[backbone.arch]) if isinstance(backbone.arch, str) else backbone.arch.to_dict()
    arch = {**given, **ARCHS[family.__name__]}
    arch.pop("drop_path_rate", None)  # given beside the arch
    found = {"model.backbone.arch": dict(_delete_=True, **arch), "model.backbone.drop_path_rate": 0.1}
    if (model.get("neck") or {}).get("type") == "mmvssm.SimpleFeaturePyramid":
        found["model.neck.out_channels"] = WIDTH  # which most configs leave at its default
    if "init_cfg" in backbone:
        found["model.backbone.init_cfg"] = None
    if "window_size" in backbone:  # in proportion to the map
        found["model.backbone.window_size"] = tuple(side // 8 for side in backbone.window_size)
    widths = {given["embed_dims"] * 2**stage: arch["embed_dims"] * 2**stage for stage in range(4)}
    if "depth" in arch:  # a plain network: one width, and outputs spread over the depth
        default = family.arch_keys["depth"]
        outs = tuple((index + 1) * arch["depth"] // given.get("depth", default) - 1 for index in backbone.out_indices)
        found["model.backbone.out_indices"] = outs
    return {**found, **_width_options(model, widths)}


def _swin_options(model: Any) -> dict[str, Any]:
    small = dict(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])
    found = {f"model.backbone.{key}": value for key, value in small.items()}
    if "arch" in model.backbone:
        found = {"model.backbone.arch": dict(_delete_=True, **small)}
    return {**found, **_width_options(model, {96 * 2**stage: 8 * 2**stage for stage in range(4)})}


def _width_options(model: Any, widths: dict[int, int]) -> dict[str, Any]:
    """Each width of the backbone that a neck or head is built for, replaced by that of the small network.

    A wrong width in the config stays wrong: it is no key, or the key of another stage.
    """
    found = {}
    for part in ("neck", "head", "decode_head", "auxiliary_head"):
        value = (model.get(part) or {}).get("in_channels")
        if value is not None:
            new = widths[value] if isinstance(value, int) else [widths[width] for width in value]
            found[f"model.{part}.in_channels"] = new
    return found
