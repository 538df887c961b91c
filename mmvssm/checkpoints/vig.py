"""ViG and ViG-H: the authors' files of both, current names and the older ones of the pyramid."""

import re
from collections.abc import Collection

import torch

from mmvssm.checkpoints.families import Family, StateDict

# Official stem name -> ours; the pyramid's has `proj` and `norm` in older files.
_STEM_PLAIN = {"proj.0": "conv1", "proj.1": "norm1", "proj.3": "conv2", "proj.4": "norm2"}
_STEM_PYRAMID = {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2", "proj": "conv1", "norm": "norm1"}
_MIXER = {
    "in_proj.0.weight": "conv.weight",
    "gk_proj.1.weight": "decay_proj.weight",
    "gk_proj.1.bias": "decay_proj.bias",
    "g_proj.bias": "gate.bias",
    "g_norm.weight": "g_norm.weight",
    "l_norm.weight": "gate.norm.weight",
    "o_proj.weight": "out_proj.weight",
}
# Three layers that read the same tokens are one here; in the order of its rows.
_FUSED = ("qkv_proj.weight", "g_proj.weight", "gk_proj.0.weight")
_IN_PROJ = "in_proj.weight"
_BLOCK_PLAIN = {"attn_norm": "norm1", "mlp_norm": "norm2", "mlp.gate_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
_BLOCK_PYRAMID = {"norm": "norm1", "ln_1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}

# (official place of a mixer, ours), of the plain family and of the pyramid
_PLAIN_MIXER = re.compile(r"blocks\.(\d+)\.attn\.(.+)")
_PYRAMID_MIXER = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(?:op|self_attention)\.(.+)")
_OUR_MIXER = re.compile(r"(?:stages\.(\d+)\.)?blocks\.(\d+)\.mixer\.(.+)")


class ViGFamily(Family):
    """ViG and ViG-H (https://arxiv.org/abs/2405.18425)."""

    name = "vig"
    title = "ViG"

    def is_official(self, names: set[str]) -> bool:
        matches = (_PLAIN_MIXER.fullmatch(n) or _PYRAMID_MIXER.fullmatch(n) for n in names)
        return any(m[m.lastindex] == "gk_proj.0.weight" for m in matches if m)

    def is_ours(self, names: set[str]) -> bool:
        return any(m[3] == "decay_proj.weight" for n in names if (m := _OUR_MIXER.fullmatch(n)))

    def is_output_norm(self, name: str) -> bool:
        return re.fullmatch(r"norm\d\.(weight|bias)", name) is not None

    def resize(self, name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        if name != "pos_embed" or tensor.ndim != 4 or tensor.shape[-1] != shape[-1]:
            return None
        from mmvssm.models.backbones.vig import resize_position_embedding

        return resize_position_embedding(tensor, tuple(shape[1:3]))

    def convert(self, state_dict: StateDict) -> tuple[StateDict, list[str]]:
        pyramid = not any(m[2] == "gk_proj.0.weight" for n in state_dict if (m := _PLAIN_MIXER.fullmatch(n)))
        last = max((int(m[1]) for n in state_dict if (m := _PYRAMID_MIXER.fullmatch(n))), default=0)
        dense_norm = f"outnorm{last}.weight" in state_dict
        converted, unknown = {}, []
        fused: dict[str, dict[str, str]] = {}  # our name of the joint layer -> official leaf -> official name
        for name, tensor in state_dict.items():
            if place := _mixer_place(name):
                block, leaf = place
                if leaf in _FUSED:
                    fused.setdefault(f"{block}.{_IN_PROJ}", {})[leaf] = name
                    continue
                ours = f"{block}.{_MIXER[leaf]}" if leaf in _MIXER else None
            else:
                ours = _rename_pyramid(name, last) if pyramid else _rename_plain(name)
            if ours is None:
                unknown.append(name)
            elif re.match(r"(classifier\.)?norm\.", name) and dense_norm:
                continue  # the norm of the classifier gives way to the trained one of dense prediction
            else:
                converted[ours] = _with_grid(tensor) if ours == "pos_embed" else _as_linear(tensor)
        for ours, names in fused.items():
            parts = [_as_linear(state_dict[names[leaf]]) for leaf in _FUSED if leaf in names]
            if len(parts) == len(_FUSED) and len({part.shape[1:] for part in parts}) == 1:
                converted[ours] = torch.cat(parts)
            else:  # a damaged file: the names stay visible and the joint layer is missing
                unknown += names.values()
        return converted, unknown

    def official_name(self, name: str, names: Collection[str]) -> str:
        if match := _OUR_MIXER.fullmatch(name):
            block = f"blocks.{match[2]}.attn" if match[1] is None else f"layers.{match[1]}.blocks.{match[2]}.op"
            return f"{block}.{_FUSED[0] if match[3] == _IN_PROJ else _key_of(_MIXER, match[3])}"
        pyramid = any(n.startswith("stages.") for n in names)
        if match := re.fullmatch(r"patch_embed\.(\w+)\.(weight|bias)", name):
            return f"patch_embed.{_key_of(_STEM_PYRAMID if pyramid else _STEM_PLAIN, match[1])}.{match[2]}"
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            return f"blocks.{match[1]}.{_key_of(_BLOCK_PLAIN, match[2])}.{match[3]}"
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            return f"layers.{match[1]}.blocks.{match[2]}.{_key_of(_BLOCK_PYRAMID, match[3])}.{match[4]}"
        if match := re.fullmatch(r"stages\.(\d+)\.downsample\.(\w+)\.(weight|bias)", name):
            part = {"conv": "1", "norm": "3"}[match[2]]
            return f"layers.{int(match[1]) - 1}.downsample.{part}.{match[3]}"
        return "out" + name if self.is_output_norm(name) else name

    def describe(self, backbone: StateDict) -> tuple[str | None, str]:
        facts = read_hyperparameters(backbone)
        title = "ViG-H" if facts["pyramid"] else "ViG"
        for arch, settings in _arch_zoo(facts["pyramid"]).items():
            if facts == settings:
                return arch, f"{title} {arch}"
        width, depth = ("widths", "depths") if facts["pyramid"] else ("width", "depth")
        words = f"a {title} of {width} {facts['embed_dims']}, {depth} {facts['depths']}, head_dims {facts['head_dims']}"
        return None, f"{words}, hidden width {facts['hidden_dims']} (none of the named ones)"

    def how_to_build(self, arch: str, backbone: StateDict) -> str:
        kind = "ViGH" if any("stages." in n for n in backbone) else "ViG"
        return f"type='mmvssm.{kind}', arch={arch!r}"


def _mixer_place(name: str) -> tuple[str, str] | None:
    """Our name of the mixer that an official tensor belongs to, and the rest of the official name."""
    if match := _PLAIN_MIXER.fullmatch(name):
        return f"blocks.{match[1]}.mixer", match[2]
    if match := _PYRAMID_MIXER.fullmatch(name):
        return f"stages.{match[1]}.blocks.{match[2]}.mixer", match[3]
    return None


def _rename_plain(name: str) -> str | None:
    if match := re.fullmatch(r"patch_embed\.(proj\.\d)\.(weight|bias)", name):
        return f"patch_embed.{_STEM_PLAIN[match[1]]}.{match[2]}" if match[1] in _STEM_PLAIN else None
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"blocks.{match[1]}.{_BLOCK_PLAIN[match[2]]}.{match[3]}" if match[2] in _BLOCK_PLAIN else None
    if match := re.fullmatch(r"head\.(weight|bias)", name):
        return f"head.fc.{match[1]}"
    return name if name in ("pos_embed", "norm.weight") else None


def _rename_pyramid(name: str, last: int) -> str | None:
    if match := re.fullmatch(r"patch_embed\.(\w+)\.(weight|bias)", name):
        return f"patch_embed.{_STEM_PYRAMID[match[1]]}.{match[2]}" if match[1] in _STEM_PYRAMID else None
    if match := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        place = f"stages.{match[1]}.blocks.{match[2]}"
        return f"{place}.{_BLOCK_PYRAMID[match[3]]}.{match[4]}" if match[3] in _BLOCK_PYRAMID else None
    if match := re.fullmatch(r"layers\.(\d+)\.downsample\.([13])\.(weight|bias)", name):
        # It follows stage i there and opens stage i + 1 here.
        return f"stages.{int(match[1]) + 1}.downsample.{'conv' if match[2] == '1' else 'norm'}.{match[3]}"
    if match := re.fullmatch(r"outnorm(\d)\.(weight|bias)", name):
        return f"norm{match[1]}.{match[2]}"
    if match := re.fullmatch(r"(?:classifier\.)?norm\.(weight|bias)", name):
        return f"norm{last}.{match[1]}"
    if match := re.fullmatch(r"(?:classifier\.)?head\.(weight|bias)", name):
        return f"head.fc.{match[1]}"
    return None


def _as_linear(tensor: torch.Tensor) -> torch.Tensor:
    """Linear weights may be stored as 1x1 convolutions; no real convolution of the family is 1x1."""
    return tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _with_grid(pos_embed: torch.Tensor) -> torch.Tensor:
    """(1, L, C) of a square grid to (1, side, side, C); what is no square stays as it is."""
    side = round(pos_embed.shape[1] ** 0.5)
    if pos_embed.ndim == 3 and side * side == pos_embed.shape[1]:
        return pos_embed.unflatten(1, (side, side))
    return pos_embed


def _key_of(table: dict[str, str], ours: str) -> str:
    """The authors' name for ours; where a table has several, the current code's comes first."""
    return next(official for official, name in table.items() if name == ours)


def read_hyperparameters(backbone: StateDict) -> dict:
    """What a variant is made of, from the shapes of its tensors (our names)."""
    pyramid = any(n.startswith("stages.") for n in backbone)
    pattern = r"stages\.(\d+)\.blocks\.(\d+)\.norm1\.weight" if pyramid else r"(blocks)\.(\d+)\.norm1\.weight"
    blocks = sorted({(m[1], int(m[2])) for n in backbone if (m := re.fullmatch(pattern, n))})
    stages = sorted({stage for stage, _ in blocks})
    first = [f"stages.{s}.blocks.0." if pyramid else "blocks.0." for s in stages]
    return {
        "pyramid": pyramid,
        "embed_dims": tuple(backbone[f"{block}norm1.weight"].shape[0] for block in first),
        "depths": tuple(sum(stage == s for stage, _ in blocks) for s in stages),
        "head_dims": backbone[f"{first[0]}mixer.g_norm.weight"].shape[0],
        "hidden_dims": tuple(backbone[f"{block}mlp.fc2.weight"].shape[1] for block in first),
    }


def _arch_zoo(pyramid: bool) -> dict[str, dict]:
    """The facts of `read_hyperparameters` for every named arch."""
    from mmvssm.models.backbones.base import depths_and_widths
    from mmvssm.models.backbones.vig import ViG, ViGH
    from mmvssm.models.layers import swiglu_width

    facts = {}
    for arch in (ViGH if pyramid else ViG).arch_zoo:
        spec = (ViGH if pyramid else ViG).resolve_arch(arch)
        depths, dims = depths_and_widths(spec["depths"] if pyramid else (spec["depth"],), spec["embed_dims"])
        facts[arch] = {
            "pyramid": pyramid,
            "embed_dims": dims,
            "depths": depths,
            "head_dims": spec["head_dims"],
            "hidden_dims": tuple(swiglu_width(width, spec["mlp_multiple"]) for width in dims),
        }
    return facts


FAMILY = ViGFamily()
