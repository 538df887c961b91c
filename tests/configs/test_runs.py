"""Every config trains and tests one iteration on a miniature of its data set, shrunk by ``--cfg-options``."""

import inspect
import math
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests.configs.conftest import CONFIGS, FAMILIES, config_files, parsed
from tests.tools import miniature, shrink
from tests.tools.conftest import clear_instances

FILES = config_files(*FAMILIES, "_baselines_", "_examples_")
READ_BY_RUNNER = set(inspect.signature(Runner).parameters)
VALIDATION = ("val_cfg", "val_dataloader", "val_evaluator")

# What has run in this process and passed: contents of shrunk configs.
passed: list[dict] = []


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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    pytest.importorskip("mmdet", reason="needs mmdet")
    return miniature.make_everything(tmp_path_factory.mktemp("everything"))


@pytest.fixture
def runner_of(data, tmp_path, monkeypatch):
    """A function that makes the runner of a config, in the folder in which the configs find their data."""
    monkeypatch.chdir(data)
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)  # asks compilers for their versions

    def make(cfg: Config) -> tuple[Runner, Watch]:
        clear_instances()
        cfg.work_dir = str(tmp_path)
        cfg.randomness = dict(seed=0)
        cfg.update(dict.fromkeys(VALIDATION))  # tested below, once
        runner, watch = Runner.from_cfg(cfg), Watch()
        runner.register_hook(watch)
        return runner, watch

    return make


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_one_iteration(file, runner_of):
    """The loss is finite, a finite gradient comes to every parameter (DDP would wait for others), metrics come out.

    Sizes of one recipe often become the same config. That runs once: one whose content equals, in everything that
    MMEngine's runner reads, the content of one that has passed would only repeat it.
    """
    cfg = shrink.shrunk(parsed(file))
    assert cfg.val_dataloader == cfg.test_dataloader
    assert cfg.val_evaluator == cfg.test_evaluator
    content = {key: value for key, value in cfg.to_dict().items() if key in READ_BY_RUNNER}
    if content in passed:
        return
    runner, watch = runner_of(cfg)
    runner.train()
    assert len(watch.losses) == 1
    assert math.isfinite(watch.losses[0])
    names = [name for name, _ in runner.model.named_parameters()]
    assert [name for name in names if name not in watch.gradients] == []
    assert [name for name, finite in watch.gradients.items() if not finite] == []
    assert len(runner.optim_wrapper.optimizer.state) == len(names)  # and all of them were updated

    metrics = runner.test()
    assert metrics
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    passed.append(content)


def test_unused_parameters_are_seen(runner_of):
    cfg = shrink.shrunk(parsed(CONFIGS / "vmamba" / "vmamba-tiny-s1l8_upernet_camvid.py"))
    cfg.model.decode_head.in_index = [0, 1, 2, 2]
    cfg.model.decode_head.in_channels = [8, 16, 32, 32]
    runner, watch = runner_of(cfg)
    runner.train()
    unused = {name.split(".")[1] for name, _ in runner.model.named_parameters() if name not in watch.gradients}
    assert "norm3" in unused
    assert "norm2" not in unused
