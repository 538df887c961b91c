"""The model zoo: list the configs, build models and backbones from them, with or without weights."""

import ast
import contextlib
import difflib
import functools
import os
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from mmvssm.utils import model_index
from mmvssm.utils.model_index import ModelInfo

OFFICIAL = "official"
"""Value of `checkpoint` that stands for the file the authors published for the model."""

# Default scope of a config, which is also the library that builds its model -> task.
TASKS = {"mmpretrain": "classification", "mmdet": "detection", "mmseg": "segmentation"}


def list_models(pattern: str = "*", task: str | None = None) -> list[str]:
    """Names of the configs that come with the package.

    Args:
        pattern: Shell-style pattern for the name, e.g. `'*tiny*coco'`.
        task: 'classification', 'detection', 'segmentation', or None for all.

    Returns:
        File stems, sorted. Each can be given to `get_model`.

    Raises:
        ValueError: Unknown task.
    """
    if task is not None and task not in TASKS.values():
        raise ValueError(f"task must be one of {sorted(TASKS.values())} or None, got {task!r}.")
    names = sorted(stem for stem in _configs() if fnmatchcase(stem, pattern))
    return [n for n in names if task is None or _task(_configs()[n]) == task]


def get_model(
    name: str,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    **backbone_overrides: Any,
) -> nn.Module:
    """Build a model from its config through the library that owns it (mmpretrain, mmdet or mmseg).

    Nothing is downloaded and no data set is needed: a pretrained backbone that the config names for training is not
    fetched. Without `checkpoint` the weights are freshly initialised.

    Args:
        name: A name from `list_models`, or a short one such as 'vmamba-tiny-s1l8' (its ImageNet classifier).
        checkpoint: Path or URL of weights for the whole model, ours or the authors', in any published layout, or
            'official' for the file that the authors published for it.
        device: Where the model goes.
        **backbone_overrides: Replace or add arguments of the backbone, e.g. `drop_path_rate=0.`.

    Returns:
        The model, in eval mode. mmpretrain's `inference_model` takes it as it is, mmdet's `inference_detector` and
        mmseg's `inference_model` where the default scope is that of the library
        (`mmengine.registry.init_default_scope('mmdet')`).

    Raises:
        ValueError: Unknown name (near ones are listed), no published weights, or the checkpoint does not fit.
        ImportError: The owning library is not installed.
    """
    checkpoint = resolve_checkpoint(name, checkpoint)
    config = _model_config(name, backbone_overrides)
    model = _finish(_build(config, config.model), checkpoint, device)
    _prepare_inference(model, config)
    return model


def get_backbone(
    name: str,
    checkpoint: str | os.PathLike | None = None,
    out_indices: int | tuple[int, ...] | None = None,
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> nn.Module:
    """Build the backbone of a config alone. It returns maps, also where the config's classifier takes a class token.

    Args:
        name: As in `get_model`.
        checkpoint: Path or URL of weights of the backbone or of a model around it, or 'official' for the file that the
            authors published for the model. Classifiers, necks and heads in it are left out; norms after the output
            stages are loaded only if the file has all of them.
        out_indices: Stages to return; None for those of the config (the last one for a classifier).
        device: Where the backbone goes.
        **overrides: Replace or add arguments of the backbone.

    Returns:
        The backbone, in eval mode.

    Raises:
        ValueError, ImportError: As `get_model`.
    """
    checkpoint = resolve_checkpoint(name, checkpoint)
    if out_indices is not None:
        overrides["out_indices"] = out_indices
    config = _model_config(name, overrides)
    if "out_type" not in overrides:  # a classifier's backbone may be set to give a vector
        config.model.backbone.pop("out_type", None)
    backbone = _build(config, config.model.backbone)
    return _finish(backbone, checkpoint, device)


def config_path(name: str) -> Path:
    """File of the config that `name` (a name from `list_models` or a metafile, or a short one) stands for.

    Raises:
        ValueError: Unknown name; the sentence lists near ones.
    """
    configs = _configs()
    if name in configs:
        return configs[name]
    shorts = _short_names()
    if name in shorts:
        return configs[shorts[name]]
    if (published := model_index.find_published(name)) is not None:  # a further file for the same config
        return published.config
    near = difflib.get_close_matches(str(name), [*sorted(shorts), *sorted(configs)], n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "see mmvssm.list_models()."
    raise ValueError(f"There is no model named {name!r}; {hint}")


def model_info(name: str) -> ModelInfo:
    """What is published of a model: results, size and cost, the authors' file with its licence, doubtful figures.

    Args:
        name: As in `get_model`, or a name of a metafile.

    Returns:
        The entry. For a config without published results it holds the name, the config and the family only.

    Raises:
        ValueError: Unknown name.
    """
    published = model_index.find_published(name)
    if published is None:
        path = config_path(name)
        published = model_index.find_published(path.stem)
    if published is None:
        relatives = (m.family for m in model_index.published_models().values() if m.config.parent == path.parent)
        published = ModelInfo(path.stem, path, next(relatives, path.parent.name))
    return published


def resolve_checkpoint(name: str, checkpoint: str | os.PathLike | None) -> str | os.PathLike | None:
    """The address that `checkpoint='official'` stands for with this model; any other value comes back as it is.

    Raises:
        ValueError: The authors published no weights for the model; a classifier that has some is named.
    """
    if checkpoint != OFFICIAL:
        return checkpoint
    info = model_info(name)
    if info.weights is not None:
        return info.weights
    parts = set(info.name.split("_"))
    near = [short for short in _short_names() if short in parts and model_info(short).weights is not None]
    hint = f"; there are some of its ImageNet classifier {near[0]!r}" if near else ""
    raise ValueError(f"checkpoint='official': the authors published no weights for {info.name!r}{hint}.")


def _config_folder() -> Path:
    return model_index.root() / "configs"


def _short_names() -> dict[str, str]:
    """Short name -> stem of the plainest ImageNet recipe; several may differ in input size or precision."""
    shorts: dict[str, str] = {}
    for stem in sorted(list_models("*_*in1k*", "classification"), key=len):
        shorts.setdefault(stem.partition("_")[0], stem)
    return shorts


@functools.cache
def _configs() -> dict[str, Path]:
    """Stem -> file; folders that begin with an underscore hold parts of configs and baselines."""
    found: dict[str, Path] = {}
    for path in sorted(_config_folder().rglob("*.py")):
        folders = path.relative_to(_config_folder()).parts[:-1]
        if not any(part.startswith((".", "_")) for part in folders):
            found[path.stem] = path
    return found


@functools.cache
def _task(path: Path) -> str | None:
    """Task of a config, read from its text: its `default_scope`, else the library or file it inherits from.

    Executing a hundred configs, which drags in three libraries, would take far longer.
    """
    values = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(ValueError):
                values[node.targets[0].id] = ast.literal_eval(node.value)
    if values.get("default_scope") in TASKS:
        return TASKS[values["default_scope"]]
    bases = values.get("_base_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        scope, separator, _ = base.partition("::")
        base_task = TASKS.get(scope) if separator else _task((path.parent / base).resolve())
        if base_task is not None:
            return base_task
    return None


def _model_config(name: str, backbone_overrides: dict[str, Any]) -> Config:
    path = config_path(name)
    try:
        config = Config.fromfile(path)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The config {path.stem} builds on a library that is not installed ({error}); "
            'install it with: pip install "mmvssm[openmmlab]".'
        ) from error
    _drop_pretrained(config.model)
    config.model.backbone.update(backbone_overrides)
    if config.get("data_preprocessor") is not None:  # where classifiers have theirs
        config.model.setdefault("data_preprocessor", config.data_preprocessor)
    return config


def _drop_pretrained(node: Any) -> None:
    """Remove every `init_cfg` that would load a file, so that building never downloads."""
    if isinstance(node, dict):
        init = node.get("init_cfg")
        entries = init if isinstance(init, (list, tuple)) else [init]
        kept = [e for e in entries if not (isinstance(e, dict) and e.get("type") == "Pretrained")]
        if init is not None and len(kept) < len(entries):
            node["init_cfg"] = kept or None
        if node.get("pretrained") is not None:
            node["pretrained"] = None
        children = list(node.values())
    else:
        children = node if isinstance(node, (list, tuple)) else []
    for child in children:
        _drop_pretrained(child)


def _build(config: Config, part: dict) -> nn.Module:
    scope = config.get("default_scope", "mmengine")
    if scope not in TASKS:
        raise ValueError(f"default_scope must be one of {sorted(TASKS)}, got {scope!r} in {config.filename}.")
    try:
        registry = import_module(f"{scope}.registry").MODELS
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{config.filename} needs {scope} ({error}); install it with: pip install "mmvssm[openmmlab]".'
        ) from error
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(part)


def _prepare_inference(model: nn.Module, config: Config) -> None:
    """Leave with the model what the inference functions of its library look for, as the library's own loaders do."""
    scope = config.default_scope
    with contextlib.suppress(KeyError, AttributeError, ImportError):  # a config without data, or data of other packages
        dataset = import_module(f"{scope}.registry").DATASETS.get(config.test_dataloader.dataset.type)
        model.dataset_meta = model._dataset_meta = dataset.METAINFO  # mmpretrain has its own name for it
    model.cfg = model._config = config
    if scope == "mmpretrain":  # which asks for the tasks of the published results
        model._metainfo = SimpleNamespace(results=[SimpleNamespace(task="Image Classification")])


def _init_weights(model: nn.Module) -> None:
    """Initialise without MMEngine's log of every single parameter."""
    model._dump_init_info = lambda *_: None
    try:
        model.init_weights()
    finally:
        del model._dump_init_info


def _finish(model: nn.Module, checkpoint: str | os.PathLike | None, device: str | torch.device) -> nn.Module:
    from mmvssm.checkpoints import load_into

    if checkpoint is None:
        _init_weights(model)
    else:
        load_into(model, checkpoint)
    return model.to(device).eval()
