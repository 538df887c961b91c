"""Make MMEngine know the scope ``mmvssm``: ``_base_ = 'mmvssm::...'`` and default scopes."""

from __future__ import annotations

from types import ModuleType

from mmvssm.compat.import_hooks import after_import

SCOPE = "mmvssm"


def install() -> None:
    """Enter mmvssm in MMEngine's table of modules and distributions when that table is loaded."""
    after_import("mmengine.config.utils", _add_scope)
    after_import("mmengine.config.config", _leave_scope_to_config)


def _add_scope(module: ModuleType) -> None:
    module.MODULE2PACKAGE.setdefault(SCOPE, SCOPE)


def _leave_scope_to_config(module: ModuleType) -> None:
    """Bases ``mmvssm::...`` mean what they mean when inherited by path.

    MMEngine looks for the types of an external base in the scope of its package. Those of our configs are names of the
    library that a config is for, found by its ``default_scope``, and say ``mmvssm.`` where they are ours.
    """
    find = module.Config._get_cfg_path

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = find(cfg_path, filename)
        return path, None if scope == SCOPE else scope

    module.Config._get_cfg_path = staticmethod(get_cfg_path)
