"""Vim: the authors' classifiers, and their detectors and segmentors, whose pyramids are necks here."""

import re
from collections.abc import Collection

from mmvssm.checkpoints.families import Family, StateDict

# Official parameter of a mixer -> ours.
_DIRECTION = {
    "conv1d.weight": "conv_weight",
    "conv1d.bias": "conv_bias",
    "x_proj.weight": "x_proj_weight",
    "dt_proj.weight": "dt_proj_weight",
    "dt_proj.bias": "dt_proj_bias",
    "A_log": "A_log",
    "D": "D",
}
_BACKWARD = {
    "conv1d_b.weight": "conv_weight",
    "conv1d_b.bias": "conv_bias",
    "x_proj_b.weight": "x_proj_weight",
    "dt_proj_b.weight": "dt_proj_weight",
    "dt_proj_b.bias": "dt_proj_bias",
    "A_b_log": "A_log",
    "D_b": "D",
}
_MIXER = {
    "in_proj.weight": "in_proj.weight",
    "out_proj.weight": "out_proj.weight",
    "gamma": "layer_scale",
    **{theirs: f"forward_scan.{ours}" for theirs, ours in _DIRECTION.items()},
    **{theirs: f"backward_scan.{ours}" for theirs, ours in _BACKWARD.items()},
}
# With decays of its own only, the backward direction shares everything else (bimamba_type v1).
_SHARED_DECAYS = "backward_A_log"
_TOKENS = ("cls_token", "cls_token_head", "cls_token_tail", "pos_embed")
_OUTPUT_NORM = re.compile(r"norm\d*\.(weight|bias)")
# Layers of the simple feature pyramid that are a convolution with a norm, by level.
_PYRAMID_CONVOLUTIONS = {"2": "45", "3": "12", "4": "01", "5": "12"}


class VimFamily(Family):
    """Vim (https://arxiv.org/abs/2401.09417)."""

    name = "vim"
    title = "Vim"
    # The authors track an average, but their numbers are of the raw weights. A file of MMEngine is taken as it is.
    prefer_ema = None

    def is_official(self, names: set[str]) -> bool:
        return "patch_embed.proj.weight" in names and "layers.0.mixer.x_proj.weight" in names

    def is_ours(self, names: set[str]) -> bool:
        return any(re.fullmatch(r"layers\.\d+\.mixer\.forward_scan\.A_log", n) for n in names)

    def is_output_norm(self, name: str) -> bool:
        return _OUTPUT_NORM.fullmatch(name) is not None

    def convert(self, state_dict: StateDict) -> tuple[StateDict, list[str]]:
        converted, unknown = {}, []
        for name, tensor in state_dict.items():
            if name.startswith("rope.freqs_"):
                continue  # tables, made anew for every grid
            ours = self.convert_outside(name) or self._rename(name, state_dict)
            if ours is None:
                unknown.append(name)
            else:
                converted[ours] = tensor.flatten(1) if ours.endswith("conv_weight") else tensor
        return converted, unknown

    def _rename(self, name: str, names: Collection[str]) -> str | None:
        if name in _TOKENS:
            return name
        if match := re.fullmatch(r"layers\.(\d+)\.mixer\.(.+)", name):
            if match[2] == "A_b_log" and f"layers.{match[1]}.mixer.conv1d_b.weight" not in names:
                return f"layers.{match[1]}.mixer.{_SHARED_DECAYS}"
            return f"layers.{match[1]}.mixer.{_MIXER[match[2]]}" if match[2] in _MIXER else None
        if re.fullmatch(r"layers\.\d+\.norm\.(weight|bias)", name):
            return name
        for theirs, ours in {"patch_embed.proj": "patch_embed.projection", "norm_f": "norm", "head": "head.fc"}.items():
            if name in (f"{theirs}.weight", f"{theirs}.bias"):
                return ours + name.removeprefix(theirs)
        return None

    def convert_outside(self, name: str) -> str | None:
        """The pyramids: `fpn1.0.weight` of segmentors, `simfp_2.4.norm.weight` of detectors."""
        name = name.removeprefix("backbone.")
        if match := re.fullmatch(r"fpn([1-4])\.(\d)\.(\w+)", name):
            return f"neck.levels.{int(match[1]) - 1}.{match[2]}.{match[3]}"
        if match := re.fullmatch(r"simfp_([2-5])\.(\d)\.(norm\.)?(weight|bias)", name):
            level, layer, norm, leaf = match.groups()
            part = "" if layer not in _PYRAMID_CONVOLUTIONS[level] else norm or "conv."
            return f"neck.levels.{int(level) - 2}.{layer}.{part}{leaf}"
        return None

    def official_name(self, name: str, names: Collection[str]) -> str:
        if match := re.fullmatch(r"layers\.(\d+)\.mixer\.(.+)", name):
            theirs = {ours: theirs for theirs, ours in _MIXER.items()} | {_SHARED_DECAYS: "A_b_log"}
            return f"layers.{match[1]}.mixer.{theirs[match[2]]}"
        for theirs, ours in {"patch_embed.proj": "patch_embed.projection", "norm_f": "norm"}.items():
            if name in (f"{ours}.weight", f"{ours}.bias"):
                return theirs + name.removeprefix(ours)
        return name

    def describe(self, backbone: StateDict) -> tuple[str | None, str]:
        facts = read_hyperparameters(backbone)
        rows = facts.pop("position_rows")
        for arch, settings in _arch_zoo().items():
            # Weights do not depend on the distance of patches; the position embedding for 224 pixels tells it.
            plus = settings["stride"] == 8
            if facts == _expected(settings) and plus == (rows in (27 * 27, 27 * 27 + 1)):
                return arch, f"{self.title} {arch}"
        words = f"a {self.title} of width {facts['embed_dims']}, depth {facts['depth']}, inner width {facts['inner']}"
        words += f", d_state {facts['d_state']}, patch size {facts['patch_size']}, {facts['norm']} norm"
        return None, f"{words}, directions {facts['directions']} (none of the named ones)"


def read_hyperparameters(backbone: StateDict) -> dict:
    """What a variant is made of, from the shapes of its tensors (our names)."""
    mixer = "layers.0.mixer."
    directions = "shared" if mixer + _SHARED_DECAYS in backbone else "forward"
    patches = backbone["patch_embed.projection.weight"]
    return {
        "embed_dims": patches.shape[0],
        "patch_size": patches.shape[2],
        "depth": len({n.split(".")[1] for n in backbone if n.startswith("layers.")}),
        "inner": backbone[mixer + "out_proj.weight"].shape[1],
        "d_state": backbone[mixer + "forward_scan.A_log"].shape[1],
        "d_conv": backbone[mixer + "forward_scan.conv_weight"].shape[1],
        "dt_rank": backbone[mixer + "forward_scan.dt_proj_weight"].shape[1],
        "directions": "separate" if mixer + "backward_scan.A_log" in backbone else directions,
        "norm": "layer" if "layers.0.norm.bias" in backbone else "rms",
        "position_rows": backbone["pos_embed"].shape[1] if "pos_embed" in backbone else None,
    }


def _arch_zoo() -> dict[str, dict]:
    from mmvssm.models.backbones.vim import Vim

    return {name: Vim.resolve_arch(name) for name in Vim.arch_zoo}


def _expected(settings: dict) -> dict:
    """The same facts as `read_hyperparameters`, of an entry of the arch table; all have the default options."""
    width = settings["embed_dims"]
    return {
        "embed_dims": width,
        "patch_size": settings["patch_size"],
        "depth": settings["depth"],
        "inner": settings["expand"] * width,
        "d_state": settings["d_state"],
        "d_conv": settings["d_conv"],
        "dt_rank": -(-width // 16),
        "directions": "separate",
        "norm": "rms",
    }


FAMILY = VimFamily()
