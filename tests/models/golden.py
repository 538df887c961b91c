"""Builds VMamba from a golden's key file and official hyperparameters, filled as the reference was."""

import json

import numpy as np
import torch

from mmvssm.checkpoints import convert_official
from mmvssm.models import VMamba
from tests.helpers import golden_fill, shared_dir

STEM = {"v1": "patch", "v2": "conv"}
DOWNSAMPLE = {"v1": "merge", "v2": "conv2", "v3": "conv3"}


def read_keys(variant: str) -> dict:
    """Shapes, hyperparameters and parameter count of an official variant."""
    return json.loads(shared_dir("golden", "vmamba", f"{variant}.keys.json").read_text())


def read_arrays(name: str) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Arrays of a golden file, and one record per array."""
    with np.load(shared_dir("golden", "vmamba", f"{name}.npz")) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, [json.loads(record) for record in arrays.pop("meta")]


def official_arguments(hyper: dict) -> dict:
    """Our constructor arguments for the authors' hyperparameters."""
    version, *postfixes = hyper["forward_type"].split("_")
    arch = {
        "embed_dims": hyper["dims"],
        "depths": hyper["depths"],
        "ssm_ratio": hyper["ssm_ratio"],
        "d_state": hyper["ssm_d_state"],
        "gated": "noz" not in postfixes,
        "conv_bias": hyper["ssm_conv_bias"],
        "mlp_ratio": hyper["mlp_ratio"],
        "stem": STEM[hyper["patchembed_version"]],
        "downsample": DOWNSAMPLE[hyper["downsample_version"]],
        "fp32_core": version == "v0",
    }
    return {
        "arch": arch,
        "drop_path_rate": hyper["drop_path_rate"],
        "dt_rank": hyper["ssm_dt_rank"],
        "d_conv": hyper["ssm_conv"],
        "ssm_act": hyper["ssm_act_layer"],
        "gate_act": None if "nozact" in postfixes else hyper["ssm_act_layer"],
        "out_act": "gelu" if "oact" in postfixes else None,
        "mlp_act": hyper["mlp_act_layer"],
    }


def filled(names: dict) -> dict[str, torch.Tensor]:
    """Official name -> tensor for {official name: shape}."""
    return {name: torch.from_numpy(golden_fill().fill_tensor(name, shape)) for name, shape in names.items()}


def convert(tensors: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """State dicts of our backbone and of the classification head."""
    converted = convert_official(tensors, family="vmamba")
    backbone = {k.removeprefix("backbone."): v for k, v in converted.items() if k.startswith("backbone.")}
    head = {k.removeprefix("head.fc."): v for k, v in converted.items() if k.startswith("head.fc.")}
    assert len(backbone) + len(head) == len(converted)
    return backbone, head


def dense_backbone(keys: dict) -> VMamba:
    """The official network as a four-stage backbone, strictly loaded."""
    net = VMamba(**official_arguments(keys["hyperparameters"]))
    net.load_state_dict(convert(filled({**keys["shapes"], **keys["backbone_extra"]}))[0], strict=True)
    return net.eval()


def classifier(keys: dict):
    """The official classifier as a function of the image, strictly loaded."""
    net = VMamba(**official_arguments(keys["hyperparameters"]), out_indices=(3,)).eval()
    backbone, head = convert(filled(keys["shapes"]))
    net.load_state_dict(backbone, strict=True)
    return lambda x: torch.nn.functional.linear(net(x)[0].mean((2, 3)), head["weight"], head["bias"])


def image_of(record: dict) -> torch.Tensor:
    """The input image of a record."""
    spec = record["image"]
    return torch.from_numpy(golden_fill().image(spec["height"], spec["width"], spec["batch"], spec["seed"]))
