"""Small Vim models for the tests."""

import torch

from mmvssm.models import Vim

from .common import enlarge

SMALL = dict(embed_dims=16, depth=4, patch_size=8, d_state=4)
DENSE = dict(with_cls_token=False, out_indices=(0, 1, 3), img_size=32)
VARIANTS = {
    "dense": dict(DENSE),
    "class token": dict(img_size=32, out_type="cls_token"),
    "mixer outputs": dict(DENSE, feature="mixer", out_norm="each"),
    "rope": dict(DENSE, rope=True, rope_residual=True, out_norm=None),
    "shared": dict(img_size=32, directions="shared", layer_scale=0.5, norm="layer"),
    "alternate": dict(img_size=32, directions="forward", alternate=True, cls_token="double", out_indices=(1, 3)),
}


def make(name="dense", arch=SMALL, **kwargs) -> Vim:
    torch.manual_seed(0)
    net = Vim(arch, **{**VARIANTS[name], **kwargs})
    return enlarge(net)
