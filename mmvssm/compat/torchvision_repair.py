"""Import torchvision beside a torch for which its compiled part cannot load.

PyPI's torchvision is a CUDA build. Beside a CPU build of torch its compiled part finds no libtorch_cuda, is left out,
and then ``import torchvision`` itself fails, because it registers meta functions for operators that were never defined
("operator torchvision::nms does not exist"). mmpretrain imports torchvision, so nothing of it works. Declaring the two
operators lets the import finish; transforms, models and io work, and only the compiled operators themselves raise.
"""

from __future__ import annotations

import sys
from types import ModuleType

from mmvssm.compat import pieces
from mmvssm.compat.import_hooks import WrappedLoader, wrap_loader

PIECE = pieces.register(
    "torchvision import",
    reason="PyPI's CUDA build of torchvision (0.28 - 0.29) cannot be imported beside a CPU build of torch",
    until="torchvision can be imported without its compiled part",
)

_OPERATORS = ("nms", "qnms")
# Keeps the declared operators alive: torch removes them when the library object is collected.
_library = None


def install() -> None:
    """Repair the import of torchvision from now on; nothing is done where it imports by itself."""
    if "torchvision" not in sys.modules:
        wrap_loader("torchvision", _Loader)


class _Loader(WrappedLoader):
    """Executes torchvision; on the error of missing operators declares them and executes it again."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            _declare_operators()
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            self.loader.exec_module(module)
            PIECE.activate("compiled part does not load beside this torch, operators only declared")
        else:
            PIECE.stand_by("torchvision imports by itself")


def _declare_operators() -> None:
    global _library
    import torch

    if _library is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
