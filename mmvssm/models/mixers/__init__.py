"""Token mixers, one per file."""

from .ss2d import SS2D

__all__ = ["SS2D"]
