"""Make MMEngine know the scope ``mmvssm``: ``_base_ = 'mmvssm::...'`` and default scopes."""

from __future__ import annotations

from types import ModuleType

from mmvssm.compat.import_hooks import after_import


def install() -> None:
    """Enter mmvssm in MMEngine's table of modules and distributions when that table is loaded."""
    after_import("mmengine.config.utils", _add_scope)


def _add_scope(module: ModuleType) -> None:
    module.MODULE2PACKAGE.setdefault("mmvssm", "mmvssm")
