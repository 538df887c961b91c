"""Small ViG models for the tests."""

import torch

from mmvssm.models import ViG, ViGH

from .common import enlarge

SMALL = {
    "plain": (ViG, dict(embed_dims=16, depth=4, head_dims=8, conv_act="silu", out_act="silu", mlp_multiple=16)),
    "pyramid": (ViGH, dict(embed_dims=16, depths=(1, 1, 2, 1), head_dims=8, mlp_multiple=8)),
}


def make(name="pyramid", **kwargs):
    torch.manual_seed(0)
    family, arch = SMALL[name]
    kwargs.setdefault("out_indices", (0, 1, 2, 3))
    net = family(arch, **({"img_size": 64} if name == "plain" else {}), **kwargs)
    return enlarge(net)
