"""What other libraries need to work with current torch, setuptools and transformers.

One module per piece, each with its reason and the condition under which it can be deleted. :func:`install` only places
import hooks: a piece acts when the library it concerns is imported, and only if that library needs it.
``python tools/misc/check_env.py`` prints what is active and why.
"""

from mmvssm.compat import (
    announce,
    checkpoint_loading,
    find_loader,
    installed_path,
    mmcv_ext,
    official_files,
    scope,
    torchvision_repair,
    transformers5,
    zoo_names,
)
from mmvssm.compat.pieces import Piece, all_pieces, summary

__all__ = ["Piece", "all_pieces", "install", "summary"]

_installed = False


def install() -> None:
    """Place the import hooks; called by ``import mmvssm``. Calling it again changes nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    for piece in (
        scope,
        find_loader,
        torchvision_repair,
        mmcv_ext,
        installed_path,
        transformers5,
        checkpoint_loading,
        official_files,
        zoo_names,
        announce,
    ):
        piece.install()
