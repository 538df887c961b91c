"""Small MambaVision models for the tests."""

import torch
from torch import nn

from mmvssm.models import MambaVision

SMALL = {
    "plain": dict(embed_dims=8, stem_dims=8, depths=(1, 1, 2, 2), num_heads=(2, 4), window_size=(4, 3)),
    "scaled": dict(
        embed_dims=8, stem_dims=8, depths=(1, 1, 3, 2), num_heads=(2, 2), window_size=(4, 3), layer_scale=0.5
    ),
}
STOCK_INIT = [
    dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]


def make(name="plain", **kwargs) -> MambaVision:
    torch.manual_seed(0)
    net = MambaVision(SMALL[name], **kwargs)
    with torch.no_grad():  # larger than at the start of training, so that every branch shows in the output
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for norm in batch_norms(net):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return net


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
