"""What the tests of the feature export read and compare."""

import numpy as np
from PIL import Image

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1))
MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
CONFIG = f"""
default_scope = 'mmpretrain'
data_preprocessor = dict(num_classes=2, mean={MEAN}, std={STD}, to_rgb=True)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmvssm.VMamba', arch={ARCH}, out_indices=(1, 3), drop_path_rate=0.1,
                  init_cfg=dict(type='Pretrained', checkpoint='https://example.org/absent.pth', prefix='backbone.')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=64),
)
test_pipeline = [dict(type='LoadImageFromFile'),
                 dict(type='ResizeEdge', scale=64, edge='short', interpolation='bicubic')]
"""
PREPROCESSOR = f"data_preprocessor=dict(type='DetDataPreprocessor', mean={MEAN}, std={STD}, bgr_to_rgb=True)"
FPN = f"""
default_scope = 'mmdet'
model = dict(
    type='MaskRCNN',
    {PREPROCESSOR},
    backbone=dict(type='mmvssm.VMamba', arch={ARCH}, out_indices=(1, 2, 3)),
    neck=dict(type='FPN', in_channels=[16, 32, 64], out_channels=4, num_outs=4),
    rpn_head=dict(type='RPNHead'),
)
"""
PLAIN = f"""
default_scope = 'mmdet'
model = dict(
    type='MaskRCNN',
    {PREPROCESSOR},
    backbone=dict(type='mmvssm.ViG', arch=dict(embed_dims=16, depth=2, head_dims=8), img_size=64, out_indices=(1,)),
    neck=dict(type='mmvssm.SimpleFeaturePyramid', in_channels=[16], out_channels=4, num_outs=5),
)
"""
QUICK = dict(checkpoint="random", num_workers=0, device="cpu", progress=False)


def save_noise(path, size, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def contents(folder):
    """Name -> bytes of everything that an export wrote."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
