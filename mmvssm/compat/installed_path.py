"""Bases such as ``mmdet::...`` without ``pkg_resources``, with onedl distributions and editable installs.

MMEngine 0.10.7 finds the folder of a library for ``_base_ = 'mmdet::...'`` through ``pkg_resources``, which setuptools
82 dropped; it asks for the distribution ``mmsegmentation``, which the onedl line calls differently; and it looks for
editable installs in the wrong folder. The import system knows the folder in all three cases.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from types import ModuleType

from mmvssm.compat import pieces
from mmvssm.compat.import_hooks import after_import

PIECE = pieces.register(
    "mmdet:: bases",
    reason="mmengine 0.10.7 uses pkg_resources: gone in setuptools 82, blind to onedl and editable installs",
    until="mmengine.utils.get_installed_path uses importlib",
)

_MODULE = "mmengine.utils.package_utils"
# Modules that hold their own references to the functions.
_USERS = ("mmengine.utils", "mmengine.config.config", "mmengine.hub.hub")


def install() -> None:
    """Replace the two look-ups when ``mmengine.utils`` is imported."""
    after_import(_MODULE, _replace)


def get_installed_path(package: str) -> str:
    """Folder of the import package of a distribution, e.g. ``.../site-packages/mmseg`` for ``mmsegmentation``.

    Args:
        package (str): Name of a distribution or of a top-level module.

    Returns:
        str: Absolute folder.

    Raises:
        ModuleNotFoundError: If nothing of that name is installed.
        RuntimeError: If it is a namespace package, which has no single folder.
    """
    namespace = False
    for module in _module_names(package):
        spec = importlib.util.find_spec(module)
        if spec is None:
            continue
        if spec.origin is None:
            namespace = True
            continue
        return os.path.dirname(os.path.abspath(spec.origin))
    if namespace:
        raise RuntimeError(
            f"{package} is a namespace package (or an empty folder on the path), so it has no single folder"
        )
    raise ModuleNotFoundError(f"{package} is not installed; it is needed for configs that inherit from it")


def is_installed(package: str) -> bool:
    """Whether a distribution or top-level module of that name can be imported."""
    try:
        get_installed_path(package)
    except (ModuleNotFoundError, RuntimeError):
        return _has_distribution(package)
    return True


def _module_names(package: str) -> list[str]:
    """Top-level modules that a distribution name may stand for, the likeliest first."""
    from mmengine.config.utils import MODULE2PACKAGE

    names = [module for module, distribution in MODULE2PACKAGE.items() if distribution == package]
    names.append(package.replace("-", "_"))
    try:
        listed = importlib.metadata.distribution(package).read_text("top_level.txt") or ""
    except importlib.metadata.PackageNotFoundError:
        listed = ""
    names += listed.split()
    return [name for name in dict.fromkeys(names) if name.isidentifier()]


def _has_distribution(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _replace(module: ModuleType) -> None:
    for name, function in (("get_installed_path", get_installed_path), ("is_installed", is_installed)):
        original = getattr(module, name)
        for holder in (module, *(sys.modules.get(user) for user in _USERS)):
            if holder is not None and getattr(holder, name, None) is original:
                setattr(holder, name, function)
    PIECE.activate("found by importlib")
