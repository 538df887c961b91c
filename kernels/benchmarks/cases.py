"""What is timed: the shapes of the published models by name, and series of lengths for the plots."""

from typing import NamedTuple

from mmvssm_kernels.testing import (
    AddNorm,
    BiasActivation,
    BidirectionalGla,
    BidirectionalScan,
    Conv1d,
    Gate,
    Scan,
    Scan2d,
    SwiGlu,
)

CASES: dict[str, NamedTuple] = {
    "ss2d 224 b128 stage 1": Scan2d(128, 96, 56, 56, 6, 1),
    "ss2d 224 b128 stage 2": Scan2d(128, 192, 28, 28, 12, 1),
    "ss2d 224 b128 stage 3": Scan2d(128, 384, 14, 14, 24, 1),
    "ss2d 224 b128 stage 4": Scan2d(128, 768, 7, 7, 48, 1),
    "ss2d 512x2048 b2 stage 1": Scan2d(2, 96, 128, 512, 6, 1),
    "ss2d 800x1216 b2 stage 1": Scan2d(2, 96, 200, 304, 6, 1),
    "ss2d 800x1216 b4 stage 1": Scan2d(4, 96, 200, 304, 6, 1),
    "ss2d 800x1216 b2 stage 2": Scan2d(2, 192, 100, 152, 12, 1),
    "ss2d 800x1216 b2 stage 3": Scan2d(2, 384, 50, 76, 24, 1),
    "ss2d 800x1216 b2 stage 4": Scan2d(2, 768, 25, 38, 48, 1),
    "ss2d v0 b128 56x56": Scan2d(128, 192, 56, 56, 6, 16),
    "ss2d v0 b128 14x14": Scan2d(128, 768, 14, 14, 24, 16),
    "block vim-tiny b128": BidirectionalScan(128, 384, 197, 12, 16),
    "block vim-small b128": BidirectionalScan(128, 768, 197, 24, 16),
    "block vim-tiny L4097 b4": BidirectionalScan(4, 384, 4097, 12, 16),
    "block vim-tiny L16129 b2": BidirectionalScan(2, 384, 16129, 12, 16),
    "scan vim-tiny b128": Scan(128, 384, 197, 16, gate=True),
    "scan vim-tiny L16129 b2": Scan(2, 384, 16129, 16, gate=True),
    "scan mambavision-t stage 3": Scan(128, 160, 196, 8),
    "scan mambavision-t stage 4": Scan(128, 320, 49, 8),
    "gla vig-tiny b128": BidirectionalGla(128, 196, 3, 32, 64),
    "gla+norm vig-tiny b128": BidirectionalGla(128, 196, 3, 32, 64, norm=True),
    "gla+norm vig-small b128": BidirectionalGla(128, 196, 6, 32, 64, norm=True),
    "gla vigh-tiny stage 1": BidirectionalGla(128, 3136, 3, 16, 32),
    "gla vigh-tiny stage 3": BidirectionalGla(128, 196, 12, 16, 32),
    "gla vig-tiny L4096 b4": BidirectionalGla(4, 4096, 3, 32, 64),
    "gla vigh-tiny L67200 b1": BidirectionalGla(1, 67200, 3, 16, 32),
    "conv vim-tiny b128": Conv1d(128, 384, 197),
    "conv vim-small b128": Conv1d(128, 768, 197, reverse=True),
    "conv vim-tiny L4096 b4": Conv1d(4, 384, 4096),
    "conv mambavision-t stage 3": Conv1d(128, 160, 196, 3, bias=False, padding="same"),
    "norm vim-tiny b128": AddNorm(128, 197, 192),
    "norm vim-small b128": AddNorm(128, 197, 384),
    "norm vim-base b128": AddNorm(128, 197, 768, drop=True),
    "norm vmamba-tiny stage 1": AddNorm(128, 3136, 96, "layer", bias=True),
    "norm alone vmamba-tiny stage 1": AddNorm(128, 3136, 96, "layer", bias=True, alone=True),
    "gate vig-tiny b128": Gate(128, 196, 3, 64, silu=True, bias=True),
    "gate vigh-tiny stage 1": Gate(128, 3136, 3, 32, bias=True),
    "swiglu vig-tiny b128": SwiGlu(128, 196, 512),
    "swiglu vigh-base stage 1": SwiGlu(128, 3136, 352),
    "bias mambavision-t stage 1": BiasActivation(128, 3136, 80, "gelu_tanh"),
}

# Time over length: about the same number of tokens, as one long sequence or as many short ones.
_TOKENS = 2**16
_LENGTHS = (64, 256, 1024, 4096, 16384, 65536)
SERIES: dict[str, dict[int, NamedTuple]] = {
    "selective_scan, 384 channels, 16 states": {n: Scan(_TOKENS // n, 384, n, 16, gate=True) for n in _LENGTHS},
    "selective_scan_2d, 96 channels, 1 state": {
        n: Scan2d(_TOKENS // n, 96, round(n**0.5), round(n**0.5), 6, 1) for n in _LENGTHS
    },
    "bidirectional_selective_scan, 384 channels": {
        n: BidirectionalScan(_TOKENS // n, 384, n, 12, 16) for n in _LENGTHS
    },
    "bidirectional_gla, 3 heads of 32 and 64": {n: BidirectionalGla(_TOKENS // n, n, 3, 32, 64) for n in _LENGTHS},
}
