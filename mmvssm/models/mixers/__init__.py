"""Token mixers, one per file."""

from .attention import SelfAttention
from .bidirectional_gla import BidirectionalGLA
from .bidirectional_mamba import BidirectionalMamba
from .mambavision import MambaVisionMixer
from .ss2d import SS2D

__all__ = ["SS2D", "BidirectionalGLA", "BidirectionalMamba", "MambaVisionMixer", "SelfAttention"]
