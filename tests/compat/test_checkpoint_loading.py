"""Checkpoints of real (tiny) MMEngine runs: resuming, testing, and files that must be refused."""

import pickle
import shutil

import pytest
import torch

pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")

from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from torch.utils.data import Dataset

from mmvssm.compat import checkpoint_loading, pieces


class Points(Dataset):
    """Eight fixed points of a line."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.tensor([index / 8.0]), "y": torch.tensor([2 * index / 8.0 + 1])}


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x, y, mode="tensor"):
        if mode == "loss":
            return {"loss": (self.line(x) - y).square().mean()}
        return [(self.line(x) - y).abs().mean().item()]


class Distance(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return {"distance": sum(results) / len(results)}


def make_runner(work_dir, epochs, **options):
    loader = {"batch_size": 4, "num_workers": 0, "sampler": {"type": "DefaultSampler", "shuffle": False}}
    loader |= {"dataset": Points(), "collate_fn": {"type": "default_collate"}}
    return Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}},
        param_scheduler={"type": "CosineAnnealingLR", "T_max": 10, "by_epoch": True},
        test_dataloader=loader,
        test_cfg={},
        test_evaluator=Distance(),
        randomness={"seed": 0},
        experiment_name=f"{work_dir.name}-{epochs}",
        log_level="WARNING",
        **options,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of three epochs, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    runner = make_runner(folder, 3)
    return folder, runner.train().state_dict()


def test_resumed_run_equals_the_whole_run(trained, tmp_path):
    folder, expected = trained
    shutil.copy(folder / "epoch_2.pth", tmp_path / "epoch_2.pth")
    runner = make_runner(tmp_path, 3, load_from=str(tmp_path / "epoch_2.pth"), resume=True)
    model = runner.train().state_dict()
    assert runner.epoch == 3
    for name, value in expected.items():
        assert torch.equal(model[name], value), name
    history = runner.message_hub.get_scalar("train/loss")
    assert isinstance(history, HistoryBuffer)
    assert len(history.data[0]) == 6  # four values from the file, two of its own
    assert history.mean() == pytest.approx(history.data[0].mean())


def test_testing_with_a_checkpoint(trained, tmp_path):
    folder, model = trained
    runner = make_runner(tmp_path, 3, load_from=str(folder / "epoch_3.pth"))
    x = torch.arange(8) / 8.0
    expected = (model["line.weight"] * x + model["line.bias"] - (2 * x + 1)).abs().mean().item()
    assert runner.test()["distance"] == pytest.approx(expected, rel=1e-5)
    assert "checkpoint loading" in pieces.summary()


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare pickle"])
def test_malicious_file_is_refused(tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"weight": torch.zeros(1)}, "meta": Malicious()}
    if layout == "bare pickle":
        (tmp_path / "bad.pth").write_bytes(pickle.dumps(content["meta"]))
    else:
        torch.save(content, "bad.pth", _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(ValueError, match=r"bad\.pth"):
        CheckpointLoader.load_checkpoint("bad.pth", map_location="cpu")
    assert not (tmp_path / "executed").exists()


def test_malicious_file_behind_a_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"meta": Malicious()}, "bad.pth")
    asked = []
    monkeypatch.setattr("mmvssm.checkpoints.reader.download", lambda url: asked.append(url) or "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth"):
        CheckpointLoader.load_checkpoint("https://example.com/bad.pth", map_location="cpu")
    assert asked == ["https://example.com/bad.pth"]
    assert not (tmp_path / "executed").exists()


def test_truncated_file_is_a_sentence(trained, tmp_path):
    whole = (trained[0] / "epoch_1.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pth.*truncated"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "half.pth"), map_location="cpu")


def test_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "nowhere.pth"), map_location="cpu")


def test_trusting_is_explicit(tmp_path, monkeypatch):
    """torch's own switch allows any object; it is never on by itself."""
    path = tmp_path / "objects.pth"
    torch.save({"meta": Line()}, path)
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    try:
        cautious = checkpoint_loading.load_from_local(str(path), "cpu")["meta"]
    except ValueError:
        cautious = None
    assert not isinstance(cautious, Line)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert isinstance(checkpoint_loading.load_from_local(str(path), "cpu")["meta"], Line)
