"""The authors' files in MMEngine's loading: `load_checkpoint`, inferencers, `load_from`.

MMEngine loads by name and goes on with random weights after a warning where names differ, which they all do in the
authors' files. For models with a backbone of ours such files are brought to our names before.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from mmvssm.compat.import_hooks import after_import


def install() -> None:
    """Wrap the function that all of MMEngine's loading ends in when its module is imported."""
    after_import("mmengine.runner.checkpoint", _extend)


def _extend(module: ModuleType) -> None:
    # Functions that other modules hold already look this one up when they are called.
    load = getattr(module, "load_state_dict", None)
    if load is None:
        return

    @functools.wraps(load)
    def load_any(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        from mmvssm.checkpoints.loading import under_our_names

        return load(model, under_our_names(model, state_dict), *args, **kwargs)

    module.load_state_dict = load_any
