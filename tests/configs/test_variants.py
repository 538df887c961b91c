"""Mixed precision and moving averages of the configs do what they say, as far as a CPU can show it."""

import copy

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from torch import nn

from tests.configs.conftest import CONFIGS, parsed
from tests.tools import shrink
from tests.tools.conftest import load_tool


def test_the_flag_gives_what_an_amp_file_has():
    """The other files differ from their twins in nothing else, see the tests of building."""
    plain = copy.deepcopy(parsed(CONFIGS / "vim" / "mask-rcnn_vim-tiny_simfpn_ms-crop-3x_coco.py"))
    load_tool("train").enable_amp(plain)
    assert plain.optim_wrapper.pop("loss_scale") == "dynamic"  # the default of AmpOptimWrapper
    amp = parsed(CONFIGS / "vim" / "mask-rcnn_vim-tiny_simfpn_amp-ms-crop-3x_coco.py")
    assert plain.optim_wrapper == amp.optim_wrapper


class Precision(Hook):
    """Notes the losses and the dtypes that come out of linear layers."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.losses: list[float] = []

    def before_train(self, runner) -> None:
        for module in runner.model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda module, _, out: self.dtypes.add(out.dtype))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses.append(float(outputs["loss"]))


def test_mixed_precision_runs_in_half_and_keeps_float32_weights(runner_of):
    """In bfloat16, which stands for float16 here; the loss is that of float32 up to rounding."""
    file = CONFIGS / "mambavision" / "mambavision-t_upernet_8xb2-fit-amp-160k_ade20k-512x512.py"
    found = {}
    for name in ("8xb2-fit", "8xb2-fit-amp"):
        cfg = shrink.shrunk(parsed(file))
        if name == "8xb2-fit":
            cfg.optim_wrapper.type = "OptimWrapper"
        runner, _ = runner_of(cfg)
        found[name] = Precision()
        runner.register_hook(found[name])
        runner.train()
        assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.float32}
    assert found["8xb2-fit"].dtypes == {torch.float32}
    assert found["8xb2-fit-amp"].dtypes == {torch.bfloat16}
    assert found["8xb2-fit-amp"].losses == pytest.approx(found["8xb2-fit"].losses, rel=0.02)
    assert found["8xb2-fit-amp"].losses != found["8xb2-fit"].losses


class Weights(Hook):
    """Notes the weight of the classifier after every training iteration and when testing begins."""

    priority = "LOWEST"  # after the hook that averages or swaps them

    def __init__(self) -> None:
        self.trained: list[torch.Tensor] = []
        self.tested: torch.Tensor | None = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.trained.append(runner.model.head.fc.weight.detach().clone())

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.tested = runner.model.head.fc.weight.detach().clone()


@pytest.mark.parametrize(
    ("name", "on_average"),
    [("vmamba/vmamba-tiny-s1l8_8xb128_in1k", True), ("vim/vim-tiny_8xb128_in1k", False)],
)
def test_moving_average(runner_of, tmp_path, name, on_average):
    """The average is kept from the second iteration on; VMamba is tested with it, Vim with the weights themselves."""
    cfg = shrink.shrunk(parsed(CONFIGS / f"{name}.py"))
    (hook,) = cfg.custom_hooks
    assert hook.type == "EMAHook"
    hook.momentum = 0.25  # visible after two steps
    cfg.train_cfg.max_epochs = 2
    cfg.optim_wrapper.optimizer.lr = 10.0
    runner, _ = runner_of(cfg)
    weights = Weights()
    runner.register_hook(weights)
    runner.train()
    first, second = weights.trained
    assert not torch.allclose(first, second, rtol=1e-3)
    average = 0.75 * first + 0.25 * second
    (ema,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    torch.testing.assert_close(ema.ema_model.module.head.fc.weight, average)

    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    torch.testing.assert_close(saved["state_dict"]["head.fc.weight"], average)

    cfg.load_from = str(tmp_path / "epoch_2.pth")  # as tools/test.py does
    runner, _ = runner_of(cfg)
    runner.register_hook(weights)
    runner.test()
    torch.testing.assert_close(weights.tested, average if on_average else second)
