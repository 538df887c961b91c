"""Selective-scan operators for visual state-space models; needs torch, uses Triton on a GPU.

Importing this package imports torch only. Triton is imported at the first call that runs a Triton kernel.
"""

from .add_norm import add_norm
from .bias_activation import bias_activation
from .bidirectional_gla import bidirectional_gla
from .bidirectional_selective_scan import ScanParameters, bidirectional_selective_scan
from .cast_together import cast_together
from .causal_conv1d import causal_conv1d
from .dispatch import available_backends, use_backend
from .locality_gate import locality_gate
from .selective_scan import selective_scan
from .selective_scan_2d import selective_scan_2d
from .swiglu import swiglu

__all__ = [
    "ScanParameters",
    "add_norm",
    "available_backends",
    "bias_activation",
    "bidirectional_gla",
    "bidirectional_selective_scan",
    "cast_together",
    "causal_conv1d",
    "locality_gate",
    "selective_scan",
    "selective_scan_2d",
    "swiglu",
    "use_backend",
]
