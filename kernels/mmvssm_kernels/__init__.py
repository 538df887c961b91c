"""Selective-scan operators for visual state-space models; needs torch, uses Triton on a GPU.

Importing this package imports torch only. Triton is imported at the first call that runs a Triton kernel.
"""

from .dispatch import available_backends, use_backend
from .selective_scan import selective_scan
from .selective_scan_2d import selective_scan_2d

__all__ = ["available_backends", "selective_scan", "selective_scan_2d", "use_backend"]
