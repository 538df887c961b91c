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
    load = module._load_checkpoint_to_model

    @functools.wraps(load)
    def load_any(model: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        from mmvssm.checkpoints.loading import under_our_names

        return load(model, under_our_names(model, checkpoint), *args, **kwargs)

    module._load_checkpoint_to_model = load_any
