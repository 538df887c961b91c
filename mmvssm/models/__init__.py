"""Models; importing this package registers them in scope ``mmvssm``."""

from .backbones import BaseBackbone, VMamba

__all__ = ["BaseBackbone", "VMamba"]
