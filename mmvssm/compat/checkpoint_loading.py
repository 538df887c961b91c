"""Checkpoints of MMEngine runs under torch >= 2.6.

MMEngine 0.10.7 calls ``torch.load`` without arguments. Since torch 2.6 that refuses everything but plain tensors, while
every checkpoint of a run holds MMEngine's ``HistoryBuffer`` objects too: resuming and testing fail. onedl-mmengine
falls back to a load that executes whatever the file contains, and both lines do so for URLs. Files and URLs are instead
read by :mod:`mmvssm.checkpoints.reader`, which builds known harmless objects only and refuses the rest.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from mmvssm.compat import pieces
from mmvssm.compat.import_hooks import after_import

PIECE = pieces.register(
    "checkpoint loading",
    reason="mmengine cannot read its own checkpoints with torch >= 2.6, or (onedl) executes the pickles in them",
    until="mmengine writes checkpoints that torch.load(weights_only=True) reads",
)

# torch's own switch for "I trust the files that I load".
_TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def install() -> None:
    """Replace MMEngine's loaders of files and URLs when ``mmengine.runner`` is imported."""
    after_import("mmengine.runner.checkpoint", _register_loaders)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a local checkpoint without executing code from it; the loader of MMEngine for paths without a scheme.

    Args:
        filename (str): Path; ``~`` is expanded.
        map_location (Any): As in ``torch.load``.

    Returns:
        Any: What the file holds, usually a dict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, no checkpoint, or holds objects that are not known to be harmless.
    """
    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {filename} does not exist")
    if os.environ.get(_TRUST, "0").lower() in ("1", "true", "yes", "y"):
        import torch

        return torch.load(path, map_location=map_location, weights_only=False)
    from mmvssm.checkpoints.reader import load_file

    return load_file(path, map_location=map_location)


def load_from_http(filename: str, map_location: Any = None) -> Any:
    """The same for an http(s) URL; the file is kept in torch's cache, where MMEngine keeps it too.

    Args:
        filename (str): URL.
        map_location (Any): As in ``torch.load``.

    Returns:
        Any: What the file holds.

    Raises:
        ValueError: As :func:`load_from_local`, and if the download fails.
    """
    from mmvssm.checkpoints.reader import download

    return load_from_local(download(filename), map_location)


def _register_loaders(module: ModuleType) -> None:
    # MMEngine logs `__name__` without its first ten letters ("load_from_") as the name of the backend.
    register = module.CheckpointLoader.register_scheme
    register(prefixes="", loader=load_from_local, force=True)
    register(prefixes=["http://", "https://"], loader=load_from_http, force=True)
    PIECE.activate("checkpoints are read without executing pickles")
