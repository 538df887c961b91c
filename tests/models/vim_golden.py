"""Builds Vim from a golden's key file and official hyperparameters, filled as the reference was."""

import json

import numpy as np
import torch
from torch.nn import functional as F

from mmvssm.checkpoints import convert_official
from mmvssm.models import DeconvPyramid, SimpleFeaturePyramid, Vim
from tests.helpers import shared_dir

from .golden import filled

DIRECTIONS = {"v2": "separate", "v1": "shared", "none": "forward"}


def read_keys(variant: str) -> dict:
    """Shapes, hyperparameters and parameter count of an official variant; all of them for 'options'."""
    return json.loads(shared_dir("golden", "vim", f"{variant}.keys.json").read_text())


def read_arrays(name: str) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Arrays of a golden file, and one record per case."""
    with np.load(shared_dir("golden", "vim", f"{name}.npz")) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, [json.loads(record) for record in arrays.pop("meta")]


def official_arguments(hyper: dict) -> dict:
    """Our constructor arguments for the authors' hyperparameters, dense or not."""
    position = "double" if hyper.get("use_double_cls_token") else "middle"
    if not (hyper.get("use_middle_cls_token") or position == "double"):
        position = "head"
    return {
        "arch": {
            "embed_dims": hyper["embed_dim"],
            "depth": hyper["depth"],
            "patch_size": hyper["patch_size"],
            "stride": hyper.get("stride"),
            "d_state": hyper["d_state"],
            **hyper.get("ssm_cfg", {}),
        },
        "img_size": hyper["img_size"],
        "with_cls_token": hyper["if_cls_token"],
        "cls_token": position,
        "with_pos_embed": hyper["if_abs_pos_embed"],
        "rope": hyper["if_rope"],
        "rope_residual": hyper["if_rope_residual"],
        "norm": "rms" if hyper["rms_norm"] else "layer",
        "residual_in_fp32": hyper["residual_in_fp32"],
        "directions": "shared" if hyper.get("if_bimamba") else DIRECTIONS[hyper["bimamba_type"]],
        "divide_out": hyper["if_divide_out"],
        "layer_scale": hyper.get("init_layer_scale"),
        "alternate": hyper.get("if_bidirectional", False),
        "flip_ratio": hyper.get("flip_img_sequences_ratio", 0.0),
    }


def read_out(hyper: dict) -> str:
    """Our `out_type` for the vector that the authors' classifier takes."""
    if hyper["if_cls_token"]:
        return "cls_token"
    return {"mean": "avg_featmap", "none": "last_token", "max": "raw", "all": "raw"}[hyper["final_pool_type"]]


def convert(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of our backbone, neck and classification head."""
    converted = convert_official(tensors, family="vim")
    parts = {
        part: {k.removeprefix(f"{part}."): v for k, v in converted.items() if k.startswith(f"{part}.")}
        for part in ("backbone", "neck", "head.fc")
    }
    assert sum(map(len, parts.values())) == len(converted)
    return parts


class Classifier(torch.nn.Module):
    """The official classifier, strictly loaded."""

    def __init__(self, hyper: dict, shapes: dict):
        super().__init__()
        parts = convert(filled(shapes))
        self.backbone = Vim(**official_arguments(hyper), out_type=read_out(hyper))
        self.backbone.load_state_dict(parts["backbone"], strict=True)
        self.head = torch.nn.Linear(hyper["embed_dim"], hyper["num_classes"])
        self.head.load_state_dict(parts["head.fc"])
        self.maximum = not hyper["if_cls_token"] and hyper["final_pool_type"] == "max"
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The feature and the logits of images."""
        feature = self.backbone(x)[-1]
        logits = F.linear(feature, self.head.weight, self.head.bias)
        return feature, logits.max(1).values if self.maximum else logits


def dense_model(keys: dict, hyper: dict) -> tuple[Vim, torch.nn.Module]:
    """The official dense backbone and its pyramid, strictly loaded, for the image size of ``hyper``."""
    detection = "out_feature" in hyper
    prefix = "net." if detection else ""
    side = hyper["img_size"] // hyper["patch_size"]
    shapes = {**keys["shapes"], f"{prefix}pos_embed": [1, side * side, hyper["embed_dim"]]}
    parts = convert(filled(shapes))
    stream = detection or hyper["use_residual_as_feature"]
    backbone = Vim(
        **{**official_arguments(hyper | {"stride": hyper.get("stride", 16)}), "with_cls_token": False},
        out_indices=-1 if detection else hyper["out_indices"],
        feature="stream" if stream else "mixer",
        out_norm=None,
    )
    backbone.load_state_dict(parts["backbone"], strict=True)
    neck = (SimpleFeaturePyramid if detection else DeconvPyramid)(backbone.out_channels)
    neck.load_state_dict(parts["neck"], strict=False)
    absent = {k for k in neck.state_dict() if k not in parts["neck"]}
    assert absent <= {"levels.0.1.num_batches_tracked"}
    return backbone.eval(), neck.eval()
