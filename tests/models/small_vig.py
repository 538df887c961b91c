"""Small ViG models for the tests."""

import torch

from mmvssm.models import ViG, ViGH

SMALL = {
    "plain": (ViG, dict(embed_dims=16, depth=4, head_dims=8, conv_act="silu", out_act="silu", mlp_multiple=16)),
    "pyramid": (ViGH, dict(embed_dims=16, depths=(1, 1, 2, 1), head_dims=8, mlp_multiple=8)),
}
STOCK_INIT = [
    dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]


def make(name="pyramid", **kwargs):
    torch.manual_seed(0)
    family, arch = SMALL[name]
    kwargs.setdefault("out_indices", (0, 1, 2, 3))
    net = family(arch, **({"img_size": 64} if name == "plain" else {}), **kwargs)
    with torch.no_grad():  # larger than at the start of training, so that every branch shows in the output
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return net
