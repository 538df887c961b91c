"""What the command line tools share: reading a config, flags of the three libraries, mistakes as one sentence."""

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmvssm.apis.zoo import TASKS

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
# Top-level names that MMEngine's runner or one of the libraries' tools reads although a config may not hold them.
_EXTRA_KEYS = {
    "auto_scale_lr",
    "compile",
    "custom_imports",
    "data_root",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "runner_type",
    "strategy",
    "tta_model",
    "tta_pipeline",
}
_CFG_OPTIONS_HELP = (
    'change settings of the config, as dotted.key=value; lists as key=a,b or key="[a,b]", nested ones as '
    'key="[(a,b),(c,d)]" (with quotation marks, without blanks); elements of a list by number, as '
    "param_scheduler.0.end=100"
)


class UserError(Exception):
    """A mistake of the user, told in one sentence and without a traceback."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that training and testing have in common."""
    parser.add_argument("--work-dir", help="folder for logs and checkpoints, ./work_dirs/<config name> by default")
    parser.add_argument("--data-root", help="use this folder wherever the config names its data_root")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help=_CFG_OPTIONS_HELP)
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none", help="job launcher")
    parser.add_argument("--no-pin-memory", action="store_true", help="do not pin memory in the data loaders")
    # torch.distributed.launch passes this one; torchrun sets the environment variable instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def load_config(path: str, cfg_options: dict | None = None, data_root: str | None = None) -> Config:
    """Reads a config file and applies the command line's changes.

    Args:
        path: File to read.
        cfg_options: Dotted keys and values, merged into the config.
        data_root: Replaces the config's ``data_root`` in every string that begins with it.

    Raises:
        UserError: if the file is missing or cannot be read, or an option changes what does not exist.
    """
    if not Path(path).is_file():
        raise UserError(f"config {path} not found{_similar_configs(path)}")
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        if _wants_traceback():
            raise
        raise UserError(f"config {path} cannot be read: {type(error).__name__}: {_one_line(error)}") from error
    if cfg_options:
        _merge_options(cfg, cfg_options)
    if data_root is not None:
        _replace_data_root(cfg, data_root)
    for name in LOADERS:
        loader = cfg.get(name)
        if loader and loader.get("num_workers") == 0 and loader.get("persistent_workers"):
            loader.persistent_workers = False  # torch refuses the combination
    return cfg


def task_of(cfg: Config) -> str:
    """``'classification'``, ``'detection'`` or ``'segmentation'``, read from the config's default scope."""
    scope = cfg.get("default_scope")
    if scope not in TASKS:
        known = ", ".join(f"'{name}' ({task})" for name, task in TASKS.items())
        raise UserError(f"default_scope of the config must be one of {known}, got {scope!r}")
    return TASKS[scope]


def apply_common_arguments(cfg: Config, args: argparse.Namespace) -> None:
    """Work folder, launcher and data loader defaults."""
    cfg.launcher = args.launcher
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)

    for name in LOADERS:
        loader = cfg.get(name)
        if not loader:
            continue
        if task_of(cfg) == "classification":  # what mmpretrain's own tools fill in; its configs rely on it
            loader.setdefault("pin_memory", True)
            loader.setdefault("persistent_workers", loader.get("num_workers", 0) > 0)
            loader.setdefault("collate_fn", dict(type="default_collate"))
        if args.no_pin_memory:
            loader.pin_memory = False


def require_file(path: str, what: str) -> None:
    """Raises UserError unless ``path`` is an existing file or an address."""
    if "://" not in path and not Path(path).is_file():
        raise UserError(f"{what} {path} not found")


def build_runner(cfg: Config) -> Runner:
    """The runner that the config asks for."""
    if "runner_type" not in cfg:
        return Runner.from_cfg(cfg)
    from mmengine.registry import RUNNERS

    return RUNNERS.build(cfg)


class _Phase(Hook):
    """Notes how far a run has come, to tell mistakes in the config from failures of a running job."""

    setting_up, first_batch, running = range(3)

    def __init__(self) -> None:
        self.phase = self.setting_up

    def before_train(self, runner: Runner) -> None:
        self.phase = self.first_batch

    before_test = before_train

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        self.phase = self.running

    after_test_iter = after_train_iter


_phase = _Phase()


def watch(runner: Runner) -> None:
    """Lets :func:`run_tool` tell mistakes in the set-up of this runner from later failures."""
    runner.register_hook(_phase)


def run_tool(tool: Callable[[], Any]) -> int:
    """Runs a tool's body and turns mistakes of the user into one sentence on stderr.

    What fails while things are set up (config, registry, data, checkpoint) counts as a mistake; so does a rejected
    value during the first batch, and a missing file at any time. Other failures keep their traceback. With
    ``MMVSSM_TRACEBACK=1`` all do.

    Returns:
        Exit code: 0, or 2 after a mistake.
    """
    _phase.phase = _Phase.setting_up
    try:
        tool()
    except Exception as error:
        mistakes = {
            _Phase.setting_up: Exception,
            _Phase.first_batch: (UserError, ValueError, TypeError, OSError),
            _Phase.running: (UserError, FileNotFoundError),
        }[_phase.phase]
        if _wants_traceback() or not isinstance(error, mistakes):
            raise
        hint = "" if isinstance(error, UserError) else " (MMVSSM_TRACEBACK=1 shows where)"
        print(f"error: {_one_line(error)}{hint}", file=sys.stderr)
        return 2
    return 0


class CheckedLoading(Hook):
    """Loads the checkpoint under test through :mod:`mmvssm.checkpoints`.

    Files of the authors work like ours, and a file that does not fit is an error; MMEngine would evaluate random
    weights after a warning.
    """

    priority = "HIGHEST"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        from mmengine.model import BaseTTAModel, is_model_wrapper

        from mmvssm.checkpoints import load_into

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if isinstance(model, BaseTTAModel):
            model = model.module
        load_into(model, dict(checkpoint))
        checkpoint["state_dict"] = model.state_dict()  # for MMEngine and its EMA hook, which come next


def _wants_traceback() -> bool:
    return os.environ.get("MMVSSM_TRACEBACK", "0") not in ("", "0")


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Original Traceback" in text:  # a data loader's worker: the last line says what happened
        text = text.strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def _similar_configs(path: str) -> str:
    folder = Path(path).parent
    files = folder.glob("*.py") if folder.is_dir() else folder.parent.glob("*/*.py")
    names = {file.stem: file for file in files}
    close = difflib.get_close_matches(Path(path).stem, names, n=1, cutoff=0.6)
    return f"; did you mean {names[close[0]]}?" if close else ""


def _merge_options(cfg: Config, options: dict) -> None:
    known = set(cfg.keys()) | set(inspect.signature(Runner.__init__).parameters) | _EXTRA_KEYS
    for key in options:
        top = key.split(".")[0]
        if top not in known:
            close = difflib.get_close_matches(top, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(sorted(cfg.keys()))}"
            raise UserError(f"--cfg-options {key}: the config has no {top!r}{hint}")
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"--cfg-options cannot be applied: {_one_line(error)}") from error


def _replace_data_root(cfg: Config, new: str) -> None:
    old = cfg.get("data_root")
    if old is None:
        roots = {loader.dataset.get("data_root") for name in LOADERS if (loader := cfg.get(name))}
        old = roots.pop() if len(roots) == 1 else None
    if not old:
        raise UserError("--data-root: the config names no single data_root; use --cfg-options")
    old_dir, new_dir = old.rstrip("/"), new.rstrip("/")

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            inside = value == old_dir or value.startswith(old_dir + "/")
            return new_dir + value[len(old_dir) :] if inside else value
        if isinstance(value, dict):
            for key in list(value):
                dict.__setitem__(value, key, replaced(dict.__getitem__(value, key)))
            return value
        if isinstance(value, list | tuple):
            return type(value)(replaced(item) for item in value)
        return value

    for key in list(cfg.keys()):
        value = cfg[key]
        if isinstance(value, str | dict | ConfigDict | list | tuple):
            cfg[key] = replaced(value)
