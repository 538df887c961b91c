"""Models; importing this package registers them in scope ``mmvssm``."""

from .backbones import BaseBackbone, MambaVision, ViG, ViGH, Vim, VMamba
from .necks import DeconvPyramid, SimpleFeaturePyramid

__all__ = ["BaseBackbone", "DeconvPyramid", "MambaVision", "SimpleFeaturePyramid", "VMamba", "ViG", "ViGH", "Vim"]
