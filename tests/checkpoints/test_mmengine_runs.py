"""Checkpoints of MMEngine's Runner: opened safely, with a working log history, and good enough to resume."""

import copy
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from torch.utils.data import Dataset

from mmvssm.checkpoints import load_file, unwrap


class Line(BaseModel):
    """y = w x + b, trained on the mean square error."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        out = self.layer(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        return {"loss": (out**2).mean()} if mode == "loss" else out


class Points(Dataset):
    metainfo: ClassVar[dict] = {"classes": ("a", "b"), "palette": np.array([[1, 2, 3]])}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"inputs": torch.linspace(0, 1, 3) + index}


class Losses(Hook):
    """Keeps the loss of every iteration."""

    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values.append(outputs["loss"].item())


def run(folder, epochs, resume=None):
    torch.manual_seed(0)
    losses = Losses()
    runner = Runner(
        Line(),
        work_dir=str(folder),
        train_dataloader=dict(batch_size=2, dataset=Points(), sampler=dict(type="DefaultSampler", shuffle=False)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.1)),
        param_scheduler=[dict(type="CosineAnnealingLR", T_max=4, by_epoch=True)],
        custom_hooks=[dict(type="EMAHook", momentum=0.1), losses],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        load_from=resume and str(resume),
        resume=resume is not None,
        randomness=dict(seed=0),
        log_level="WARNING",
        experiment_name=folder.name,
    )
    runner.train()
    return runner, losses.values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four epochs of two iterations each; its folder, its runner and its losses."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *run(folder, epochs=4)


def test_plain_loading_cannot_open_it(finished):
    """The reason for the reader; once this fails the detour may have become unnecessary."""
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(finished[0] / "epoch_4.pth", weights_only=True)


def test_contents(finished):
    folder, runner, _ = finished
    loaded = load_file(folder / "epoch_4.pth")
    scalars = loaded["message_hub"]["log_scalars"]
    assert scalars
    for name, buffer in scalars.items():
        assert type(buffer) is HistoryBuffer
        for mine, live in zip(buffer.data, runner.message_hub.log_scalars[name].data, strict=True):
            assert np.array_equal(mine, live)
    loss = scalars["train/loss"]
    assert loss.statistics("mean") == pytest.approx(loss.data[0].mean())
    loss.update(1.0)
    assert loss.current() == 1.0
    assert loaded["meta"]["epoch"] == 4
    assert np.array_equal(loaded["meta"]["dataset_meta"]["palette"], [[1, 2, 3]])


def test_the_table_of_statistics_is_not_taken_from_the_file(finished, tmp_path):
    """It holds functions, and updating it would change a class of the whole process."""
    before = dict(HistoryBuffer._statistics_methods)
    loaded = load_file(finished[0] / "epoch_4.pth")
    assert HistoryBuffer._statistics_methods == before
    buffer = next(iter(loaded["message_hub"]["log_scalars"].values()))
    assert "statistics_methods" not in vars(buffer)


def test_registered_loader_is_ours(finished):
    """`import mmvssm` makes MMEngine's own entry point use the reader."""
    loaded = CheckpointLoader.load_checkpoint(str(finished[0] / "epoch_4.pth"), map_location="cpu", logger=None)
    assert loaded["meta"]["iter"] == 8


def test_resuming_gives_the_same_curve(finished, tmp_path):
    folder, whole, losses = finished
    resumed, last_losses = run(tmp_path / "resumed", epochs=4, resume=folder / "epoch_2.pth")
    assert len(losses) == 8
    assert last_losses == losses[4:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    history = resumed.message_hub.get_scalar("train/loss").data[0]
    assert np.array_equal(history, whole.message_hub.get_scalar("train/loss").data[0])


def test_averaged_weights_are_preferred(finished):
    """EMAHook exchanges both sets of weights in its files: `state_dict` holds the average."""
    folder, runner, _ = finished
    ema = next(h for h in runner.hooks if type(h).__name__ == "EMAHook").ema_model.module.state_dict()
    raw = runner.model.state_dict()
    loaded = load_file(folder / "epoch_4.pth")
    averaged, plain = unwrap(copy.copy(loaded)), unwrap(loaded, prefer_ema=False)
    assert averaged.keys() == plain.keys() == raw.keys()
    assert not torch.equal(raw["layer.0.weight"], ema["layer.0.weight"])
    for name in raw:
        assert torch.equal(averaged[name], ema[name])
        assert torch.equal(plain[name], raw[name])
