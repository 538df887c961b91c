"""Small MambaVision models for the tests."""

import torch
from torch import nn

from mmvssm.models import MambaVision

from .common import enlarge

SMALL = {
    "plain": dict(embed_dims=8, stem_dims=8, depths=(1, 1, 2, 2), num_heads=(2, 4), window_size=(4, 3)),
    "scaled": dict(
        embed_dims=8, stem_dims=8, depths=(1, 1, 3, 2), num_heads=(2, 2), window_size=(4, 3), layer_scale=0.5
    ),
}


def make(name="plain", **kwargs) -> MambaVision:
    torch.manual_seed(0)
    net = MambaVision(SMALL[name], **kwargs)
    enlarge(net)
    with torch.no_grad():
        for norm in batch_norms(net):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return net


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
