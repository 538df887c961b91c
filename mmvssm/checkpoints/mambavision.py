"""MambaVision: the authors' one layout, in classifiers, detectors and segmentors."""

import re
from collections.abc import Collection

import torch

from mmvssm.checkpoints.families import Family, StateDict

_BATCH_NORM = "weight|bias|running_mean|running_var|num_batches_tracked"
_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
# Names inside a block that are spelt differently; the others are the same there and here.
_BLOCK = {"gamma_1": "gamma1", "gamma_2": "gamma2"}
_INSIDE = re.compile(
    rf"(?:norm[12]\.(?:{_BATCH_NORM})|(?:conv[12]|mlp\.fc[12])\.(?:weight|bias)|gamma_[12]"
    r"|mixer\.(?:(?:in_proj|x_proj|dt_proj|out_proj|qkv|proj)\.weight|(?:dt_proj|qkv|proj)\.bias|A_log|D))"
)
# Two depthwise convolutions there, one of twice the channels here.
_HALVES = {"x": 0, "z": 1}
_CONV = re.compile(r"levels\.(\d+)\.blocks\.(\d+)\.mixer\.conv1d_([xz])\.weight")


class MambaVisionFamily(Family):
    """MambaVision (https://arxiv.org/abs/2407.08083).

    The norm of the authors' classifier, a BatchNorm, is our `batch_norm{i}`; those of their detectors and segmentors,
    LayerNorms, are `norm{i}`. One is no substitute for the other.
    """

    name = "mambavision"
    title = "MambaVision"
    # Their evaluation code reads `state_dict` where a file has `state_dict_ema` too.
    prefer_ema = None

    def is_official(self, names: set[str]) -> bool:
        return any(re.fullmatch(r"levels\.\d+\.blocks\.\d+\.mixer\.A_log", n) for n in names)

    def is_ours(self, names: set[str]) -> bool:
        return any(re.fullmatch(r"stages\.\d+\.blocks\.\d+\.mixer\.dt_proj\.weight", n) for n in names) and any(
            re.fullmatch(r"stages\.\d+\.blocks\.\d+\.mixer\.conv_weight", n) for n in names
        )

    def is_output_norm(self, name: str) -> bool:
        return re.fullmatch(rf"(norm\d\.(weight|bias)|batch_norm\d\.({_BATCH_NORM}))", name) is not None

    def convert(self, state_dict: StateDict) -> tuple[StateDict, list[str]]:
        converted, unknown, halves = {}, [], {}
        last = max(int(n.split(".")[1]) for n in state_dict if n.startswith("levels."))
        for name, tensor in state_dict.items():
            if match := _CONV.fullmatch(name):
                halves.setdefault(f"stages.{match[1]}.blocks.{match[2]}.mixer.conv_weight", {})[match[3]] = name
                continue
            ours = _rename(name, last)
            if ours is None:
                unknown.append(name)
            else:
                converted[ours] = tensor
        for ours, found in halves.items():
            if found.keys() == _HALVES.keys():
                converted[ours] = torch.cat([state_dict[found[branch]] for branch in _HALVES]).flatten(1)
            else:
                unknown += found.values()
        # The counter of a batch norm does not matter for what is computed, and some tools drop it; torch adds it too.
        for name in [n for n in converted if n.endswith(".running_mean")]:
            counter = name.replace("running_mean", "num_batches_tracked")
            converted.setdefault(counter, torch.zeros((), dtype=torch.long, device=converted[name].device))
        return converted, unknown

    def official_name(self, name: str, names: Collection[str]) -> str:
        if match := re.fullmatch(r"patch_embed\.(\w+)\.(\w+)", name):
            part = next(official for official, ours in _STEM.items() if ours == match[1])
            return f"patch_embed.conv_down.{part}.{match[2]}"
        if match := re.fullmatch(r"stages\.(\d+)\.downsample\.weight", name):
            return f"levels.{int(match[1]) - 1}.downsample.reduction.0.weight"
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
            rest = match[3].replace("conv_weight", "conv1d_x.weight")  # and conv1d_z.weight
            rest = next((official for official, ours in _BLOCK.items() if ours == rest), rest)
            return f"levels.{match[1]}.blocks.{match[2]}.{rest}"
        if match := re.fullmatch(r"batch_norm\d\.(\w+)", name):
            return f"norm.{match[1]}"
        return "out" + name if self.is_output_norm(name) else name

    def describe(self, backbone: StateDict) -> tuple[str | None, str]:
        facts = read_hyperparameters(backbone)
        for arch, settings in _arch_zoo().items():
            if facts == _expected(settings):
                # Models of the same shape differ in the windows and the data they were trained with.
                same = [a for a, other in _arch_zoo().items() if _expected(other) == facts]
                return arch, f"{self.title} {' or '.join(same)}"
        words = f"a {self.title} of width {facts['embed_dims']} (stem {facts['stem_dims']}), depths {facts['depths']}"
        words += ", with layer scale" if facts["layer_scale"] else ", without layer scale"
        return None, f"{words} (none of the named ones)"


def _rename(name: str, last: int) -> str | None:
    if match := re.fullmatch(rf"patch_embed\.conv_down\.([0134])\.({_BATCH_NORM})", name):
        return f"patch_embed.{_STEM[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)", name):
        if not _INSIDE.fullmatch(match[3]):
            return None
        return f"stages.{match[1]}.blocks.{match[2]}.{_BLOCK.get(match[3], match[3])}"
    if match := re.fullmatch(r"levels\.(\d+)\.downsample\.reduction\.0\.weight", name):
        # It follows stage i there and opens stage i + 1 here.
        return f"stages.{int(match[1]) + 1}.downsample.weight"
    if match := re.fullmatch(r"outnorm(\d)\.(weight|bias)", name):
        return f"norm{match[1]}.{match[2]}"
    if match := re.fullmatch(rf"norm\.({_BATCH_NORM})", name):
        return f"batch_norm{last}.{match[1]}"
    if match := re.fullmatch(r"head\.(weight|bias)", name):
        return f"head.fc.{match[1]}"
    return None


def read_hyperparameters(backbone: StateDict) -> dict:
    """What a variant is made of, from the shapes of its tensors (our names). Heads and windows leave no trace."""
    stages = sorted({int(m[1]) for n in backbone if (m := re.match(r"stages\.(\d+)\.blocks\.0\.norm1\.weight", n))})
    stem_dims, embed_dims = (backbone[f"patch_embed.{conv}.weight"].shape[0] for conv in ("conv1", "conv2"))
    return {
        "embed_dims": embed_dims,
        "stem_dims": stem_dims,
        "depths": tuple(
            len({n.split(".")[3] for n in backbone if n.startswith(f"stages.{i}.blocks.")}) for i in stages
        ),
        "layer_scale": any(n.endswith(".gamma1") for n in backbone),
    }


def _arch_zoo() -> dict[str, dict]:
    from mmvssm.models.backbones.mambavision import MambaVision

    return {name: MambaVision.resolve_arch(name) for name in MambaVision.arch_zoo}


def _expected(settings: dict) -> dict:
    """The same facts as `read_hyperparameters`, of an entry of the arch table."""
    return {
        "embed_dims": settings["embed_dims"],
        "stem_dims": settings["stem_dims"],
        "depths": tuple(settings["depths"]),
        "layer_scale": settings["layer_scale"] is not None,
    }


FAMILY = MambaVisionFamily()
