"""MambaVision against stored outputs and gradients of the official code on deterministic weights.

About 12 seconds on two cores, most of it the large windows and the gradients.
"""

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from mmvssm.checkpoints import convert_official
from mmvssm.models import MambaVision
from mmvssm.models.mixers import MambaVisionMixer
from mmvssm_kernels import selective_scan
from tests.helpers import shared_dir

from .golden import filled, golden_fill

# Layout -> arch; what follows are the windows of the authors' detectors and segmentors.
CLASSIFIERS = {
    "t": "t",
    "t2": "t2",
    "s": "s",
    "b": "b",
    "l": "l",
    "l2": "l2",
    "b_21k": "b-21k",
    "l_21k": "l-21k",
    "l2_512_21k": "l2-512-21k",
    "l3_256_21k": "l3-256-21k",
    "l3_512_21k": "l3-512-21k",
}
DENSE = {
    "t_coco": ("t", (112, 56)),
    "s_coco": ("s", (112, 56)),
    "b_coco": ("b", (112, 56)),
    "t_ade20k": ("t", (64, 32)),
    "s_ade20k": ("s", (160, 56)),
    "b_ade20k": ("b", (64, 32)),
    "l3_ade20k": ("l3-512-21k", (64, 32)),
}
TOLERANCE = 3e-5  # absolute, float32; a float32 run of the official code is off by 1e-5 at most
GRADIENT_TOLERANCE = 1e-4  # relative to the largest value of the array


def read_keys(layout: str) -> dict:
    return json.loads(shared_dir("golden", "mambavision", f"mambavision_{layout}.keys.json").read_text())


def read_arrays(name: str) -> tuple[dict[str, np.ndarray], list | dict]:
    """Arrays of a golden file, and its record(s)."""
    with np.load(shared_dir("golden", "mambavision", f"{name}.npz")) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def image_of(spec: dict) -> torch.Tensor:
    return torch.from_numpy(golden_fill().image(spec["height"], spec["width"], spec["batch"], spec["seed"]))


def shapes_of(layout: str, dense: bool) -> dict:
    """Names and shapes of a layout; of a classifier's with the output norms of a detector if ``dense``."""
    shapes = dict(read_keys(layout)["shapes"])
    if dense and "norm.weight" in shapes:
        width = shapes["norm.weight"][0] // 8
        shapes = {k: v for k, v in shapes.items() if not k.startswith(("norm.", "head."))}
        shapes |= {f"outnorm{i}.{p}": [width * 2**i] for i in range(4) for p in ("weight", "bias")}
    return shapes


def convert(tensors: dict) -> tuple[dict, dict]:
    """State dicts of our backbone and of the classification head."""
    converted = convert_official(tensors, family="mambavision")
    backbone = {k.removeprefix("backbone."): v for k, v in converted.items() if k.startswith("backbone.")}
    head = {k.removeprefix("head.fc."): v for k, v in converted.items() if k.startswith("head.fc.")}
    assert len(backbone) + len(head) == len(converted)
    return backbone, head


@cache
def dense_backbone(layout: str) -> MambaVision:
    """The official network with its four outputs, strictly loaded, in eval mode. Not to be changed."""
    arch, windows = DENSE.get(layout, (CLASSIFIERS.get(layout), None))
    net = MambaVision(arch, window_size=windows)
    net.load_state_dict(convert(filled(shapes_of(layout, dense=True)))[0], strict=True)
    return net.eval()


@pytest.mark.parametrize("layout", ["t", "b"])
@torch.no_grad()
def test_logits(layout):
    arrays, _ = read_arrays(f"mambavision_{layout}")
    backbone, head = convert(filled(shapes_of(layout, dense=False)))
    net = MambaVision(CLASSIFIERS[layout], out_indices=(3,)).eval()
    net.load_state_dict(backbone, strict=True)
    pooled = net(image_of(dict(height=224, width=224, batch=1, seed=0)))[0].mean((2, 3))
    logits = nn.functional.linear(pooled, head["weight"], head["bias"])
    assert np.abs(pooled.numpy() - arrays["cls224/pooled"]).max() < TOLERANCE
    assert np.abs(logits.numpy() - arrays["cls224/logits"]).max() < TOLERANCE


@pytest.mark.parametrize("layout", ["t", "b", "t_ade20k"])
@torch.no_grad()
def test_features(layout):
    """With windows larger than the map, and odd sizes; those of t_ade20k are 256 to 1024 times as large."""
    arrays, records = read_arrays(f"mambavision_{layout}")
    net = dense_backbone(layout)
    for record in records:
        if record["model"] != "backbone" or (layout == "t_ade20k" and record["case"] == "feat64x96"):
            continue  # the smaller one takes as long, and its windows are as large
        for name, value in zip(record["outputs"], net(image_of(record["image"])), strict=True):
            output = record["outputs"][name]
            assert list(value.shape) == output["shape"]
            error = np.abs(value[:, :: output["channel_stride"]].numpy() - arrays[f"{record['case']}/{name}"]).max()
            assert error < TOLERANCE, f"{record['case']}/{name}: {error}"


@torch.no_grad()
def test_windows_are_part_of_the_function():
    """The same weights with other windows are far off: no tolerance above would pass the wrong ones."""
    arrays, records = read_arrays("mambavision_t_ade20k")
    image = next(image_of(r["image"]) for r in records if r["case"] == "feat75x107")
    value = dense_backbone("t")(image)[3].numpy()
    assert np.abs(value - arrays["feat75x107/stage3"]).max() > 0.1


def test_gradients():
    arrays, meta = read_arrays("mambavision_t.grads")
    net = dense_backbone("t")
    net.zero_grad()
    image = image_of(meta["image"]).requires_grad_()
    loss = sum(
        (out * torch.from_numpy(golden_fill().normal(f"loss:stage{i}", out.shape))).mean()
        for i, out in enumerate(net(image))
    )
    loss.backward()
    gradients = official_gradients(net, shapes_of("t", dense=True))
    assert abs(loss.item() - float(arrays["loss"])) < 1e-6
    compared = {"input_grad": image.grad}
    compared |= {f"grad/{name}": gradients[name][::stride] for name, stride in meta["row_stride"].items()}
    assert set(compared) == set(arrays) - {"loss"}
    for name, value in compared.items():
        error = np.abs(value.numpy() - arrays[name]).max() / np.abs(arrays[name]).max()
        assert error < GRADIENT_TOLERANCE, f"{name}: {error}"


def official_gradients(module: nn.Module, shapes: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """Gradients of our parameters under the authors' names: the conversion that renames them is asked for the names."""
    codes = list(shapes)
    coded = {name: torch.full(shape, float(i), dtype=torch.float64) for i, (name, shape) in enumerate(shapes.items())}
    gradients = {}
    for name, code in convert(coded)[0].items():
        parameter = dict(module.named_parameters()).get(name.removeprefix(prefix))
        if parameter is not None:
            for i in code.unique().int().tolist():  # our convolution is two of theirs
                gradients[codes[i]] = parameter.grad[code == i].reshape(shapes[codes[i]])
    return gradients


def test_mixer():
    """The token mixer in float64, every gradient; the dt bias enters twice."""
    arrays, meta = read_arrays("op_mixer")
    for case in (record["case"] for record in meta["cases"]):
        stem = "levels.2.blocks.0.mixer."
        official = {k.split("/")[-1]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith(f"{case}/param/")}
        state = {
            k.rpartition("mixer.")[2]: v for k, v in convert({stem + k: v for k, v in official.items()})[0].items()
        }
        x = torch.from_numpy(arrays[f"{case}/x"]).double().requires_grad_()
        mixer = MambaVisionMixer(x.shape[-1]).double()
        mixer.load_state_dict(state, strict=True)
        y = mixer(x)
        y.backward(torch.from_numpy(arrays[f"{case}/dy"]).double())
        shapes = {stem + k: list(v.shape) for k, v in official.items()}
        gradients = official_gradients(mixer, shapes, "stages.2.blocks.0.mixer.")
        compared = {"y": y.detach(), "grad_x": x.grad}
        compared |= {k.replace(stem, "grad/"): v for k, v in gradients.items()}
        assert {f"{case}/{k}" for k in compared} == {k for k in arrays if k.startswith((f"{case}/y", f"{case}/grad"))}
        for name, value in compared.items():
            want = arrays[f"{case}/{name}"]
            tolerance = 1e-12 if want.dtype == np.float64 else 1e-7  # of the largest value; 0 where all are 0
            error = np.abs(value.numpy() - want).max()
            assert error <= tolerance * np.abs(want).max(), f"{case}/{name}: {error}"


def test_scan():
    """The operator alone, at this family's sizes; here the bias enters once."""
    arrays, _ = read_arrays("op_selective_scan")
    for case in sorted({name.split("/")[0] for name in arrays}):
        names = [n.split("/")[1] for n in arrays if n.startswith(f"{case}/") and n.split("/")[1] not in ("y", "dy")]
        names = [n for n in names if not n.startswith("grad_")]
        inputs = {n: torch.from_numpy(arrays[f"{case}/{n}"]).requires_grad_() for n in names}
        y = selective_scan(**inputs, delta_softplus=True)
        y.backward(torch.from_numpy(arrays[f"{case}/dy"]))
        for name, value in {"y": y.detach(), **{f"grad_{n}": t.grad for n, t in inputs.items()}}.items():
            want = arrays[f"{case}/{name}"]
            error = np.linalg.norm(value.numpy() - want)
            assert error <= 1e-5 * np.linalg.norm(want), f"{case}/{name}: {error}"


@pytest.mark.parametrize("layout", [*CLASSIFIERS, *DENSE])
def test_official_names_and_shapes(layout):
    """Every tensor of all 18 layouts has its place, of the right shape, in the arch of the same name."""
    keys = read_keys(layout)
    dense = layout in DENSE
    arch = DENSE[layout][0] if dense else CLASSIFIERS[layout]
    with torch.device("meta"):
        net = MambaVision(arch) if dense else MambaVision(arch, out_indices=(3,))
        tensors = {k: torch.empty(shape) for k, shape in keys["shapes"].items()}
        tensors |= {k: torch.zeros((), dtype=torch.long) for k in keys["int_buffers"]}
    backbone, head = convert(tensors)
    assert {k: v.shape for k, v in backbone.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert set(head) == (set() if dense else {"weight", "bias"})
    total = sum(p.numel() for p in net.parameters()) + sum(v.numel() for v in head.values())
    assert total == keys["num_params"]

    hyper = keys["hyperparameters"]
    windows = DENSE[layout][1] if dense else net.window_size
    assert (list(net.depths), list(windows)) == (hyper["depths"], hyper["window_size"][2:])
    assert [net.arch["embed_dims"], net.arch["stem_dims"], net.arch["layer_scale"], list(net.arch["num_heads"])] == [
        hyper["dim"],
        hyper["in_dim"],
        hyper["layer_scale"],
        hyper["num_heads"][2:],
    ]
    if not dense:
        assert net.drop_path_rate == hyper["drop_path_rate"]
    for i, blocks in hyper["attention_blocks"].items():
        scanned = [hasattr(getattr(block, "mixer", None), "A_log") for block in net.stages[int(i)].blocks]
        assert [j for j, scan in enumerate(scanned) if not scan] == (blocks if int(i) > 1 else [*range(len(scanned))])
