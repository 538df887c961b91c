"""Backbones, one file per family."""

from .base import BaseBackbone
from .mambavision import MambaVision
from .vig import ViG, ViGH
from .vim import Vim
from .vmamba import VMamba

__all__ = ["BaseBackbone", "MambaVision", "VMamba", "ViG", "ViGH", "Vim"]
