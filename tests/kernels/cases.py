"""Grids of operator cases shared by the CPU, interpreter and GPU tests."""

from mmvssm_kernels import selective_scan, selective_scan_2d
from mmvssm_kernels.testing import Scan, Scan2d

OPERATORS = {Scan: selective_scan, Scan2d: selective_scan_2d}

# Short enough for the recurrence itself to be the yardstick.
SHORT = [
    *(Scan(2, 6, length, 4, gate=True, reverse=length % 2 == 0) for length in (1, 2, 7, 49, 63, 131, 197)),
    *(Scan(1, channels, 33, 1) for channels in (1, 3, 96)),
    *(Scan(2, 8, 21, state, groups=2, gate=True) for state in (1, 3, 8, 16, 64)),
    Scan(1, 4, 40, 2, reverse=True, skip=False, bias=False, softplus=False),
    Scan(1, 4, 40, 8, step=30.0),
    Scan(1, 4, 40, 8, step=-20.0, bias=False),
    *(Scan2d(2, 6, h, w, 3, 1) for h, w in ((1, 1), (1, 7), (7, 1), (2, 2), (5, 7), (14, 14), (9, 16))),
    *(Scan2d(1, 10, 6, 11, 4, state, channel_last=False) for state in (1, 4, 16)),
    Scan2d(1, 4, 5, 6, 2, 8, step=30.0),
    Scan2d(1, 4, 5, 6, 2, 8, step=-20.0),
]

# Few programs each: interpreting a kernel costs seconds.
INTERPRETED = [
    Scan(1, 5, 1, 1),
    Scan(2, 6, 35, 3, groups=2, gate=True),
    Scan(1, 5, 35, 1, reverse=True, skip=False, bias=False, softplus=False),
    Scan2d(1, 6, 5, 7, 3, 1),
    Scan2d(1, 33, 3, 6, 2, 2, channel_last=False),
]

LARGE = [
    *(Scan(2, 96, length, 1) for length in (1000, 3136, 60800)),
    *(Scan(2, 392, 196, 8, gate=True, reverse=reverse) for reverse in (False, True)),
    Scan(4, 384, 197, 16, gate=True),
    Scan(1, 40, 3136, 64, reverse=True),
    Scan(2, 96, 1000, 16, groups=4),
    *(Scan2d(2, 96, h, w, 6, 1) for h, w in ((56, 56), (200, 304), (13, 640), (640, 13), (75, 107))),
    Scan2d(8, 192, 28, 28, 12, 1),
    Scan2d(8, 768, 7, 7, 48, 1),
    Scan2d(2, 192, 56, 56, 6, 16),
    Scan2d(2, 384, 50, 76, 12, 1, channel_last=False),
]


def case_id(case) -> str:
    """Readable test id."""
    return type(case).__name__ + "-" + "-".join(f"{k}{v}" for k, v in case._asdict().items() if v not in (None, False))
