"""Runners of shrunk configs, and a hook that sees whether training reached every parameter."""

import os

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests.tools.conftest import clear_instances

VALIDATION = ("val_cfg", "val_dataloader", "val_evaluator")


class Watch(Hook):
    """Notes the losses, and for every parameter to which a gradient comes whether it is finite."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, bool] = {}

    def before_train(self, runner: Runner) -> None:
        def note(name: str):
            return lambda gradient: self.gradients.update({name: bool(gradient.isfinite().all())})

        for name, parameter in runner.model.named_parameters():
            parameter.register_hook(note(name))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.losses.append(float(outputs["loss"]))


def make_runner(cfg: Config, work_dir: str | os.PathLike) -> tuple[Runner, Watch]:
    """The runner of ``cfg``, seeded and without validation, and the hook that watches it."""
    clear_instances()
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=0)
    cfg.update(dict.fromkeys(VALIDATION))
    runner, watch = Runner.from_cfg(cfg), Watch()
    runner.register_hook(watch)
    return runner, watch
