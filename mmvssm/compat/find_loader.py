"""``pkgutil.find_loader``, which Python 3.14 removed and mmengine 0.10.7 and mmcv use to look for ``mmcv._ext``."""

from __future__ import annotations

import importlib.util
import pkgutil

from mmvssm.compat import pieces

PIECE = pieces.register(
    "pkgutil.find_loader",
    reason="removed in Python 3.14; mmengine 0.10.7 and mmcv <= 2.2 call it",
    until="mmengine and mmcv use importlib.util.find_spec",
)


def find_loader(fullname: str):
    """Loader of a module, or None if there is no such module."""
    spec = importlib.util.find_spec(fullname)
    return None if spec is None else spec.loader


def install() -> None:
    """Put the function back where Python no longer has it."""
    if hasattr(pkgutil, "find_loader"):
        PIECE.stand_by("this Python still has it")
        return
    pkgutil.find_loader = find_loader
    PIECE.activate("restored")
