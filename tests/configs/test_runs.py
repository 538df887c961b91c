"""Every config trains and tests one iteration on a miniature of its data set, shrunk by ``--cfg-options``."""

import inspect
import math

import pytest
from mmengine.runner import Runner

from tests.configs.conftest import CONFIGS, FAMILIES, config_files, parsed
from tests.tools import shrink

FILES = config_files(*FAMILIES, "_baselines_", "_examples_")
READ_BY_RUNNER = set(inspect.signature(Runner).parameters)

# What has run in this process and passed: contents of shrunk configs.
passed: list[dict] = []


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
