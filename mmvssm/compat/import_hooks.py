"""Run a function when a module is imported, without importing it earlier.

The compatibility pieces change a few functions of other libraries. Doing that at ``import mmvssm`` would import torch,
MMEngine and more; instead one finder at the front of ``sys.meta_path`` wraps the loader of the modules concerned.
The original loader is put back into the module once it is loaded, so nothing else notices.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Action = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Answers only for the modules in ``wrappers``, with the spec that the other finders give."""

    def __init__(self) -> None:
        self.wrappers: dict[str, Callable[[importlib.abc.Loader | None], importlib.abc.Loader]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        wrap = self.wrappers.get(fullname)
        if wrap is None:
            return None
        spec = find_spec_of_others(fullname, path, target, self)
        if spec is None or spec.loader is None:
            return None
        spec.loader = wrap(spec.loader)
        return spec


class WrappedLoader(importlib.abc.Loader):
    """Loads a module through its own loader; subclasses change what happens around that."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.restore(module)
        self.loader.exec_module(module)

    def restore(self, module: ModuleType) -> None:
        """Put the module's own loader back, for everybody who looks at ``__spec__`` or ``__loader__``."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


class _ActionLoader(WrappedLoader):
    """Runs actions after the module has been executed."""

    def __init__(self, loader: importlib.abc.Loader, actions: list[Action]) -> None:
        super().__init__(loader)
        self.actions = actions

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for action in self.actions:
            action(module)


_FINDER = _Finder()
_ACTIONS: dict[str, list[Action]] = {}


def find_spec_of_others(
    fullname: str, path: Sequence[str] | None, target: ModuleType | None, asking: importlib.abc.MetaPathFinder
) -> importlib.machinery.ModuleSpec | None:
    """The spec that the finders other than ``asking`` give for a module, or None."""
    for finder in sys.meta_path:
        if finder is asking or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


def install_finder(finder: importlib.abc.MetaPathFinder) -> None:
    """Put a finder at the front of ``sys.meta_path``, once."""
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)


def wrap_loader(name: str, wrap: Callable[[importlib.abc.Loader], importlib.abc.Loader]) -> None:
    """Have module ``name`` loaded by ``wrap(its own loader)`` when it is imported from now on."""
    install_finder(_FINDER)
    _FINDER.wrappers[name] = wrap


def after_import(name: str, action: Action) -> None:
    """Call ``action(module)`` right after module ``name`` has been executed; at once if that has happened already.

    Args:
        name (str): Full module name.
        action (Callable[[ModuleType], None]): Must not raise: an exception would make the import fail.
    """
    actions = _ACTIONS.setdefault(name, [])
    actions.append(action)
    module = sys.modules.get(name)
    if module is not None:
        action(module)
    wrap_loader(name, lambda loader: _ActionLoader(loader, actions))
