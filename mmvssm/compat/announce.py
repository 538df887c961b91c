"""Say in the log of a run which compatibility pieces act, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

from mmvssm.compat import pieces
from mmvssm.compat.import_hooks import after_import

_RUNNERS = {"mmengine.runner.runner": "Runner", "mmengine.runner._flexible_runner": "FlexibleRunner"}
_announced = False


def install() -> None:
    """Have MMEngine's runners log one line when a job starts; by then everything that matters is imported."""
    for module, runner in _RUNNERS.items():
        after_import(module, functools.partial(_extend, runner))


def _extend(name: str, module: ModuleType) -> None:
    runner = getattr(module, name, None)
    for job in ("train", "val", "test"):
        method = getattr(runner, job, None)
        if method is not None and not hasattr(method, "_mmvssm_announces"):
            setattr(runner, job, _announcing(method))


def _announcing(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        global _announced
        if not _announced:
            _announced = True
            self.logger.info(pieces.summary())  # MMEngine's loggers are silent on all ranks but the first
        return method(self, *args, **kwargs)

    wrapper._mmvssm_announces = True
    return wrapper
