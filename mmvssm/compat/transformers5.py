"""mmpretrain beside transformers 5.

mmpretrain 1.2.0 switches its multi-modal models on whenever transformers >= 4.28 is installed, and these import helpers
that transformers 5 no longer has. The failed import leaves mmpretrain half loaded, after which importing
mmpretrain.models, mmdet.models and mmseg.models ends in "NoneType takes no arguments". The multi-modal models are
switched off instead.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from mmvssm.compat import pieces
from mmvssm.compat.import_hooks import after_import

PIECE = pieces.register(
    "transformers 5",
    reason="mmpretrain's multi-modal models import helpers that transformers 5 dropped; mmdet and mmseg fail with them",
    until="mmpretrain works with transformers 5 (onedl-mmpretrain 1.3.6 does not either)",
)

_HELPERS = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")


def install() -> None:
    """Correct mmpretrain's choice when ``mmpretrain.utils.dependency`` is imported."""
    after_import("mmpretrain.utils.dependency", _switch_off)


def transformers_has_helpers() -> bool:
    """Whether the installed transformers still has what mmpretrain imports; read from its source, importing nothing."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return False
    source = Path(next(iter(spec.submodule_search_locations)), "modeling_utils.py")
    if not source.is_file():
        return False
    text = source.read_text(encoding="utf-8", errors="replace")
    return all(re.search(rf"\b{name}\b", text) for name in _HELPERS)


def _switch_off(module: ModuleType) -> None:
    if not getattr(module, "WITH_MULTIMODAL", False):
        PIECE.stand_by("mmpretrain's multi-modal models are off anyway")
    elif transformers_has_helpers():
        PIECE.stand_by("the installed transformers still has what mmpretrain imports")
    else:
        module.WITH_MULTIMODAL = False
        PIECE.activate("mmpretrain's multi-modal models are switched off")
