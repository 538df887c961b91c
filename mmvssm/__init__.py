"""mmvssm: visual state-space backbones for OpenMMLab.

``import mmvssm`` is cheap: it imports neither torch nor MMEngine. It installs the import hooks of :mod:`mmvssm.compat`,
which act when (and only when) the library they concern is imported, so it should come before ``mmcv.ops`` is imported.
The functions of the model zoo are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmvssm import compat
from mmvssm.version import __version__

if TYPE_CHECKING:
    from mmvssm.apis import get_backbone, get_model, list_models, model_info
    from mmvssm.apis.features import extract_features
    from mmvssm.checkpoints import convert_official

# Public name -> module that defines it.
_LAZY = {
    "list_models": "mmvssm.apis",
    "get_model": "mmvssm.apis",
    "get_backbone": "mmvssm.apis",
    "model_info": "mmvssm.apis",
    "extract_features": "mmvssm.apis.features",
    "convert_official": "mmvssm.checkpoints",
}

__all__ = [
    "__version__",
    "convert_official",
    "extract_features",
    "get_backbone",
    "get_model",
    "list_models",
    "model_info",
]

compat.install()


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'mmvssm' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
