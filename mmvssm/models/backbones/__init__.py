"""Backbones, one file per family."""

from .base import BaseBackbone
from .vmamba import VMamba

__all__ = ["BaseBackbone", "VMamba"]
