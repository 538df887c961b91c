"""VMamba: the authors' three layouts (current code, files of the first release, single-file code of 2025)."""

import re
from collections.abc import Collection

from mmvssm.checkpoints.families import Family, StateDict

# Official block name -> ours. `ln_1` and `self_attention` are the first release's, `x_proj` and `dt_projs` the
# single-file code's.
_BLOCK = {
    "norm": "norm1",
    "ln_1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OPERATOR = {
    "in_proj.weight": "in_proj.weight",
    "in_proj.bias": "in_proj.bias",
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "x_proj_weight": "x_proj_weight",
    "x_proj.weight": "x_proj_weight",
    "dt_projs_weight": "dt_proj_weight",
    "dt_projs.weight": "dt_proj_weight",
    "dt_projs_bias": "dt_proj_bias",
    "A_logs": "A_log",
    "Ds": "D",
    "out_norm.weight": "out_norm.weight",
    "out_norm.bias": "out_norm.bias",
    "out_proj.weight": "out_proj.weight",
    "out_proj.bias": "out_proj.bias",
}
_STEM_CONV = {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2"}
_STEM_PATCH = {"0": "projection", "2": "norm", "proj": "projection", "norm": "norm"}
# Ours are Linear layers; some files hold them as 1x1 convolutions.
_LINEAR = re.compile(r"(in_proj|out_proj|fc1|fc2|reduction|head\.fc)\.weight")
_DIRECTIONS = 4


class VMambaFamily(Family):
    """VMamba (https://arxiv.org/abs/2401.10166)."""

    name = "vmamba"
    title = "VMamba"

    def is_official(self, names: set[str]) -> bool:
        return any(re.fullmatch(r"layers\.\d+\.blocks\.\d+\.(op|self_attention)\.A_logs", n) for n in names)

    def is_ours(self, names: set[str]) -> bool:
        mixer = r"stages\.\d+\.blocks\.\d+\.mixer\."
        return any(re.fullmatch(mixer + "A_log", n) for n in names) and any(
            re.fullmatch(mixer + "x_proj_weight", n) for n in names
        )

    def is_output_norm(self, name: str) -> bool:
        return re.fullmatch(r"norm\d\.(weight|bias)", name) is not None

    def convert(self, state_dict: StateDict) -> tuple[StateDict, list[str]]:
        converted, unknown = {}, []
        stem = _STEM_CONV if "patch_embed.5.weight" in state_dict else _STEM_PATCH
        last = max(int(n.split(".")[1]) for n in state_dict if n.startswith("layers."))
        dense_norm = f"outnorm{last}.weight" in state_dict
        for name, tensor in state_dict.items():
            ours = self._rename(name, state_dict, stem, last)
            if ours is None:
                unknown.append(name)
            elif re.match(r"(classifier\.)?norm\.", name) and dense_norm:
                continue  # the norm of the classifier gives way to the trained one of dense prediction
            else:
                converted[ours] = self._reshape(ours, tensor)
        return converted, unknown

    def _rename(self, name: str, state_dict: StateDict, stem: dict, last: int) -> str | None:
        if match := re.fullmatch(r"patch_embed\.(\w+)\.(weight|bias)", name):
            return f"patch_embed.{stem[match[1]]}.{match[2]}" if match[1] in stem else None
        if match := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(op|self_attention)\.(.+)", name):
            return f"stages.{match[1]}.blocks.{match[2]}.mixer.{_OPERATOR[match[4]]}" if match[4] in _OPERATOR else None
        if match := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            return f"stages.{match[1]}.blocks.{match[2]}.{_BLOCK[match[3]]}.{match[4]}" if match[3] in _BLOCK else None
        if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(\w+)\.(weight|bias)", name):
            # It follows stage i there and opens stage i + 1 here.
            part = self._downsample_part(match[1], match[2], state_dict)
            return f"stages.{int(match[1]) + 1}.downsample.{part}.{match[3]}" if part else None
        if match := re.fullmatch(r"outnorm(\d)\.(weight|bias)", name):
            return f"norm{match[1]}.{match[2]}"
        if match := re.fullmatch(r"(?:classifier\.)?norm\.(weight|bias)", name):
            return f"norm{last}.{match[1]}"
        if match := re.fullmatch(r"(?:classifier\.)?head\.(weight|bias)", name):
            return f"head.fc.{match[1]}"
        return None

    def official_name(self, name: str, names: Collection[str]) -> str:
        if match := re.fullmatch(r"patch_embed\.(\w+)\.(weight|bias)", name):
            stem = _STEM_CONV if "patch_embed.conv1.weight" in names else {"0": "projection", "2": "norm"}
            return f"patch_embed.{_key_of(stem, match[1])}.{match[2]}"
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.mixer\.(.+)", name):
            return f"layers.{match[1]}.blocks.{match[2]}.op.{_key_of(_OPERATOR, match[3])}"
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            return f"layers.{match[1]}.blocks.{match[2]}.{_key_of(_BLOCK, match[3])}.{match[4]}"
        if match := re.fullmatch(r"stages\.(\d+)\.downsample\.(\w+)\.(weight|bias)", name):
            merging = f"stages.{match[1]}.downsample.reduction.weight" in names
            part = match[2] if merging else {"conv": "1", "norm": "3"}[match[2]]
            return f"layers.{int(match[1]) - 1}.downsample.{part}.{match[3]}"
        return "out" + name if self.is_output_norm(name) else name

    @staticmethod
    def _downsample_part(stage: str, part: str, state_dict: StateDict) -> str | None:
        if part == "1":  # a convolution, or the norm of the single-file patch merging
            weight = state_dict.get(f"layers.{stage}.downsample.1.weight")
            return "norm" if weight is not None and weight.ndim == 1 else "conv"
        return {"2": "reduction", "3": "norm", "norm": "norm", "reduction": "reduction"}.get(part)

    @staticmethod
    def _reshape(name: str, tensor):
        if _LINEAR.search(name) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            return tensor.flatten(1)
        # The single-file code stacks the four directions on the rows.
        if name.endswith(("x_proj_weight", "dt_proj_weight")) and tensor.shape[0] != _DIRECTIONS:
            tensor = tensor.flatten(1)
            if tensor.shape[0] % _DIRECTIONS == 0:
                return tensor.unflatten(0, (_DIRECTIONS, -1))
        return tensor

    def describe(self, backbone: StateDict) -> tuple[str | None, str]:
        facts = read_hyperparameters(backbone)
        for arch, settings in _arch_zoo().items():
            if facts == _expected(settings):
                return arch, f"{self.title} {arch}"
        words = f"a {self.title} of widths {facts['embed_dims']}, depths {facts['depths']}"
        words += f", ssm_ratio {facts['ssm_ratio']:g}, d_state {facts['d_state']}"
        words += ", gated" if facts["gated"] else ", not gated"
        words += ", with MLP" if facts["mlp"] else ", without MLP"
        return None, f"{words}, {facts['stem']} stem, {facts['downsample']} downsampling (none of the named ones)"


def _key_of(table: dict[str, str], ours: str) -> str:
    """The authors' name for ours; where a table has several, the current code's comes first."""
    return next(official for official, name in table.items() if name == ours)


def read_hyperparameters(backbone: StateDict) -> dict:
    """What a variant is made of, from the shapes of its tensors (our names)."""
    stages = sorted({int(m[1]) for n in backbone if (m := re.match(r"stages\.(\d+)\.blocks\.0\.norm1\.weight", n))})
    mixer = "stages.0.blocks.0.mixer."
    width = backbone["stages.0.blocks.0.norm1.weight"].shape[0]
    inner = backbone[mixer + "out_proj.weight"].shape[1]
    merging = backbone.get("stages.1.downsample.conv.weight")
    return {
        "embed_dims": tuple(backbone[f"stages.{i}.blocks.0.norm1.weight"].shape[0] for i in stages),
        "depths": tuple(
            len({n.split(".")[3] for n in backbone if n.startswith(f"stages.{i}.blocks.")}) for i in stages
        ),
        "ssm_ratio": inner / width,
        "d_state": backbone[mixer + "A_log"].shape[1],
        "gated": backbone[mixer + "in_proj.weight"].shape[0] == 2 * inner,
        "conv_bias": mixer + "conv.bias" in backbone,
        "mlp": "stages.0.blocks.0.mlp.fc1.weight" in backbone,
        "stem": "conv" if "patch_embed.conv1.weight" in backbone else "patch",
        "downsample": "merge" if merging is None else f"conv{merging.shape[-1]}",
    }


def _arch_zoo() -> dict[str, dict]:
    from mmvssm.models.backbones.vmamba import VMamba

    return {name: VMamba.resolve_arch(name) for name in VMamba.arch_zoo}


def _expected(settings: dict) -> dict:
    """The same facts as `read_hyperparameters`, of an entry of the arch table."""
    dims, depths = settings["embed_dims"], tuple(settings["depths"])
    return {
        "embed_dims": tuple(dims) if not isinstance(dims, int) else tuple(dims * 2**i for i in range(len(depths))),
        "depths": depths,
        "ssm_ratio": float(settings["ssm_ratio"]),
        "d_state": settings["d_state"],
        "gated": bool(settings["gated"]),
        "conv_bias": bool(settings["conv_bias"]),
        "mlp": settings["mlp_ratio"] > 0,
        "stem": settings["stem"],
        "downsample": settings["downsample"],
    }


FAMILY = VMambaFamily()
