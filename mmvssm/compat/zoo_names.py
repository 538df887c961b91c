"""The zoo under the libraries' own entry points.

mmpretrain keeps its models in a hub that others may add to; it is filled on the first look-up, and so is our part of
it. MMEngine's inferencers (`DetInferencer`, `MMSegInferencer`) look a name up in the metafiles of one library only;
they are given our configs before that, which also spares reading hundreds of metafiles.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from mmvssm.compat.import_hooks import after_import


def install() -> None:
    """Extend the two look-ups when the modules that hold them are imported."""
    after_import("mmpretrain.apis.model", _extend_hub)
    after_import("mmengine.infer.infer", _extend_inferencers)


def _extend_hub(module: ModuleType) -> None:
    hub = getattr(module, "ModelHub", None)
    fill = getattr(hub, "_register_mmpretrain_models", None)
    if fill is None:  # a version that fills it in another way does not know our names
        return

    @functools.wraps(fill)
    def fill_with_ours(cls: type) -> None:
        fill()
        if not getattr(hub, "_mmvssm_added", False):
            hub._mmvssm_added = True
            _add_classifiers(hub)

    hub._register_mmpretrain_models = classmethod(fill_with_ours)


def _add_classifiers(hub: Any) -> None:
    """Enter our classifiers; mmpretrain could not build the detectors and segmentors of the same metafiles."""
    from modelindex.load_model_index import load

    from mmvssm.apis.zoo import list_models
    from mmvssm.utils import model_index

    index = load(str(model_index.root() / "model-index.yml"))
    index.build_models_with_collections()
    classifiers = set(list_models(task="classification"))
    for entry in index.models:
        config = model_index.published_models()[entry.name].config
        if config.stem in classifiers and entry.name.lower() not in hub._models_dict:
            entry.config = str(config)
            hub._models_dict[entry.name.lower()] = entry


def _extend_inferencers(module: ModuleType) -> None:
    look_up = getattr(module.BaseInferencer, "_load_model_from_metafile", None)
    if look_up is None:
        return

    @functools.wraps(look_up)
    def look_up_ours_first(self: Any, model: str) -> tuple[Any, str | None]:
        found = _find(model, self.scope)
        return look_up(self, model) if found is None else found

    module.BaseInferencer._load_model_from_metafile = look_up_ours_first


def _find(name: str, library: str | None) -> tuple[Any, str | None] | None:
    """Config and address of the weights of a model of the zoo; None if the name is not ours."""
    from mmengine.config import Config

    from mmvssm.apis import zoo

    try:
        info = zoo.model_info(name.lower())
    except ValueError:
        return None
    config = Config.fromfile(info.config)
    if library in zoo.TASKS and config.default_scope != library:
        raise ValueError(
            f"{name!r} is a model for {zoo.TASKS[config.default_scope]}, built by {config.default_scope}; this "
            f"inferencer builds models of {library}."
        )
    return config, info.weights
