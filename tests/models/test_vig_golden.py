"""ViG and ViG-H against stored outputs and gradients of the official code (float64 runs on deterministic weights).

About 12 seconds on two cores, most of it the two real networks.
"""

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from mmvssm.checkpoints import convert_official
from mmvssm.models import ViG, ViGH
from mmvssm.models.backbones.vig import Stream
from tests.helpers import shared_dir

from .golden import filled, golden_fill

VARIANTS = {
    "vig-t": (ViG, "tiny"),
    "vig-s": (ViG, "small"),
    "vig-b": (ViG, "base"),
    "vig-h-t": (ViGH, "tiny"),
    "vig-h-s": (ViGH, "small"),
    "vig-h-b": (ViGH, "base"),
}
# As the goldens were made: a plain float32 run of the official code is off by 6e-5 (7e-5 after block 11) at most.
TOLERANCE, BLOCK_11_TOLERANCE = 1e-4, 2e-4
GRADIENT_TOLERANCE = 1e-4  # relative to the largest value of the array


def read_keys(variant: str) -> dict:
    return json.loads(shared_dir("golden", "vig", f"{variant}.keys.json").read_text())


def read_arrays(name: str) -> tuple[dict[str, np.ndarray], dict | list]:
    """Arrays of a golden file, and its record(s)."""
    with np.load(shared_dir("golden", "vig", f"{name}.npz")) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def image_of(record: dict) -> torch.Tensor:
    return torch.from_numpy(golden_fill().image(record["height"], record["width"], record["batch"], record["seed"]))


def split(converted: dict) -> tuple[dict, dict]:
    """State dicts of our backbone and of the classification head."""
    backbone = {k.removeprefix("backbone."): v for k, v in converted.items() if k.startswith("backbone.")}
    head = {k.removeprefix("head.fc."): v for k, v in converted.items() if k.startswith("head.fc.")}
    assert len(backbone) + len(head) == len(converted)
    return backbone, head


@cache
def network(variant: str, out_indices: tuple[int, ...]) -> tuple[nn.Module, dict]:
    """The official network, strictly loaded, in eval mode, and the classifier's tensors. Not to be changed."""
    family, arch = VARIANTS[variant]
    keys = read_keys(variant)
    dense = family is ViGH and len(out_indices) > 1
    backbone, head = split(
        convert_official(filled({**keys["shapes"], **(keys["backbone_extra_shapes"] if dense else {})}))
    )
    net = family(arch, out_indices=out_indices)
    net.load_state_dict(backbone, strict=True)
    return net.eval(), head


def features(variant: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the authors' feature modes give, under the names of the golden files."""
    if variant.startswith("vig-h"):
        net, _ = network(variant, (0, 1, 2, 3))
        return {f"stage{i}": out for i, out in enumerate(net(x))}
    net, _ = network(variant, (0, 5, 11))
    last = []
    hook = net.blocks[11].register_forward_hook(lambda module, inputs, stream: last.append(stream.total()))
    outs = net(x)
    hook.remove()
    tokens = [out.flatten(2).mT for out in outs[:2]] + [last[0].flatten(1, 2)]
    return {"feat": outs[2], **{f"block{i}": t for i, t in zip((0, 5, 11), tokens, strict=True)}}


def logits_of(variant: str, x: torch.Tensor) -> torch.Tensor:
    net, head = network(variant, (-1,))
    return nn.functional.linear(net(x)[0].mean((2, 3)), head["weight"], head["bias"])


@pytest.mark.parametrize("variant", ["vig-t", "vig-h-t"])
@torch.no_grad()
def test_features_and_logits(variant):
    arrays, records = read_arrays(variant)
    compared = set()
    for record in records:
        x = image_of(record)
        got = {"logits": logits_of(variant, x)}
        if "features" in record["outputs"]:
            got |= features(variant, x)
        for output, value in got.items():
            name = f"{record['name']}/{output}"
            assert value.shape == arrays[name].shape
            error = np.abs(value.numpy() - arrays[name]).max()
            assert error < (BLOCK_11_TOLERANCE if output == "block11" else TOLERANCE), f"{name}: {error}"
            compared.add(name)
    assert compared == set(arrays)


def record_modules(net: nn.Module, places: dict[str, tuple[nn.Module, str]], x: torch.Tensor) -> dict[str, np.ndarray]:
    """Inputs or outputs of modules during one pass; grids stay (B, H, W, C)."""
    seen, hooks = {}, []
    for name, (module, which) in places.items():
        if which == "input":
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]})))
        else:
            hooks.append(
                module.register_forward_hook(
                    lambda m, args, out, name=name: seen.update({name: out.total() if isinstance(out, Stream) else out})
                )
            )
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return {name: value.numpy() for name, value in seen.items()}


def test_modules_of_the_plain_family():
    arrays, record = read_arrays("vig-t.modules")
    net, _ = network("vig-t", (-1,))
    block = net.blocks[0]
    places = {
        "patch_embed": (net.patch_embed, "output"),
        "blocks.0.attn_norm": (block.mixer, "input"),
        "blocks.0.attn.in_proj": (block.mixer.act, "output"),
        "blocks.0.attn": (block.mixer, "output"),
        "blocks.0.mlp_norm": (block.mlp, "input"),
        "blocks.0.mlp": (block.mlp, "output"),
        "blocks.0": (block, "output"),
    }
    got = record_modules(net, places, image_of(record))
    got["pos_embed_resized"] = net._position_embedding((5, 7)).detach().numpy()
    assert {f"{name}/out" for name in got} == set(arrays)
    for name, value in got.items():
        want = arrays[f"{name}/out"]
        if want.ndim == 4:  # the authors' convolution is channel-first
            want = want.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(value.reshape(want.shape), want, rtol=0, atol=2e-5, err_msg=name)


def test_modules_of_the_pyramid():
    arrays, record = read_arrays("vig-h-t.modules")
    net, _ = network("vig-h-t", (-1,))
    block = net.stages[0].blocks[0]
    places = {
        "patch_embed": (net.patch_embed, "output"),
        "layers.0.blocks.0.norm": (block.mixer, "input"),
        "layers.0.blocks.0.op.in_proj": (block.mixer.act, "output"),
        "layers.0.blocks.0.op": (block.mixer, "output"),
        "layers.0.blocks.0.mlp": (block.mlp, "output"),
        "layers.0.blocks.0": (block, "output"),
        "layers.0.downsample": (net.stages[1].downsample, "output"),
    }
    got = record_modules(net, places, image_of(record))
    assert {f"{name}/out" for name in got} == set(arrays)
    for name, value in got.items():
        want = arrays[f"{name}/out"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(value.reshape(want.shape), want, rtol=0, atol=2e-5, err_msg=name)


def official_gradients(variant: str, net: nn.Module, head: dict, shapes: dict) -> dict[str, np.ndarray]:
    """Gradients under the authors' names: the conversion itself shows where each of their tensors went."""
    marked, marked_head = split(
        convert_official({name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())})
    )
    gradients = {}
    pairs = [(marked[k], p.grad) for k, p in net.named_parameters()]
    pairs += [(marked_head[k], p.grad) for k, p in head.items()] if head else []
    for codes, gradient in pairs:
        for code in codes.unique().tolist():
            name = list(shapes)[int(code)]
            gradients[name] = gradient[codes == code].view(shapes[name]).numpy()
    return gradients


@pytest.mark.parametrize(("variant", "file"), [("vig-t", "vig-t.grad_train"), ("vig-h-t", "vig-h-t.grad")])
def test_gradients(variant, file):
    """The plain family in training mode, where the directions are merged with 1/2; the pyramid in eval mode."""
    family, arch = VARIANTS[variant]
    keys = read_keys(variant)
    arrays, meta = read_arrays(file)
    case, image = meta["case"], image_of(meta["case"]).requires_grad_()
    dense = family is ViGH
    shapes = {**keys["shapes"], **(keys["backbone_extra_shapes"] if dense else {})}
    if dense:
        shapes = {k: s for k, s in shapes.items() if k not in keys["backbone_dropped"]}
    backbone, head = split(convert_official(filled(shapes)))
    net = family(arch, out_indices=(0, 1, 2, 3) if dense else (-1,), drop_path_rate=0.0)
    net.load_state_dict(backbone, strict=True)
    net.train(case["mode"] == "train")
    head = {k: v.requires_grad_() for k, v in head.items()}
    outs = net(image)
    if dense:
        named = {f"stage{i}": out for i, out in enumerate(outs)}
    else:
        named = {"logits": nn.functional.linear(outs[0].mean((2, 3)), head["weight"], head["bias"])}
    for name, out in named.items():
        assert np.abs(out.detach().numpy() - arrays.pop(f"{case['name']}/{name}")).max() < TOLERANCE
    loss = sum(
        (out * torch.from_numpy(golden_fill().normal(f"loss:{name}", out.shape))).mean() for name, out in named.items()
    )
    loss.backward()
    assert abs(loss.item() - float(arrays.pop("loss"))) < 1e-6

    gradients = official_gradients(variant, net, head, shapes)
    got = {"grad/image": image.grad.numpy(), **{f"grad/{name}": value for name, value in gradients.items()}}
    assert set(arrays) <= set(got)
    for name, want in arrays.items():
        error = np.abs(got[name] - want).max() / np.abs(want).max()
        assert error < GRADIENT_TOLERANCE, f"{name}: {error}"
    assert set(gradients) == set(meta["grad_norms"])
    for name, want in meta["grad_norms"].items():
        assert np.linalg.norm(gradients[name].astype(np.float64)) == pytest.approx(want, rel=1e-4), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_names_and_shapes(variant):
    """Every tensor of the official network has its place, of the right shape, in the arch of the same name."""
    keys = read_keys(variant)
    family, arch = VARIANTS[variant]
    extra = keys["backbone_extra_shapes"]
    with torch.device("meta"):
        net = family(arch, out_indices=(0, 1, 2, 3) if extra else (-1,))
        tensors = {k: torch.empty(shape) for k, shape in {**keys["shapes"], **extra}.items()}
    backbone, head = split(convert_official(tensors))
    assert {k: v.shape for k, v in backbone.items()} == {k: v.shape for k, v in net.state_dict().items()}
    norms = sum(v.numel() for k, v in backbone.items() if k.startswith(("norm0.", "norm1.", "norm2.")))
    total = sum(v.numel() for v in (*backbone.values(), *head.values()))
    assert total - norms == keys["num_params"]


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["merge", "gates exchanged", "backward gate", "eps"])
def test_reference_sees_mistakes(mistake):
    """The tolerance is tight enough to notice a wrong detail of the mixer."""
    arrays, records = read_arrays("vig-t")
    record = next(r for r in records if r["name"] == "64x96_b2_s1")
    keys = read_keys("vig-t")
    net = ViG("tiny", eval_merge=0.5 if mistake == "merge" else 0.25)
    net.load_state_dict(split(convert_official(filled(keys["shapes"])))[0], strict=True)
    for block in net.blocks:
        decay = block.mixer.decay_proj
        if mistake == "gates exchanged":
            decay.weight.copy_(decay.weight.roll(96, 0))
        elif mistake == "backward gate":
            decay.weight[96:] = decay.weight[:96]
        elif mistake == "eps":
            block.mixer.g_norm.eps = 1e-5
    (feat,) = net.eval()(image_of(record))
    assert np.abs(feat.numpy() - arrays[f"{record['name']}/feat"]).max() > 2 * TOLERANCE
