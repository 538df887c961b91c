"""Necks that give plain (single-scale) backbones a pyramid of strides 4, 8, 16, 32."""

from .deconv_pyramid import DeconvPyramid
from .simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ["DeconvPyramid", "SimpleFeaturePyramid"]
