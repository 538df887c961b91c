"""The command-line converters, end to end."""

import argparse
import re

import numpy as np
import pytest
import torch

from mmvssm.checkpoints import convert_official
from tests.checkpoints.official_files import vmamba_file
from tests.helpers import ROOT


def load_tool(name):
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "model_converters" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_convert_official(tmp_path, capsys):
    tensors = vmamba_file("v0", "legacy")
    torch.save({"model": {k: v + 1 for k, v in tensors.items()}, "model_ema": tensors}, tmp_path / "official.pth")
    target = tmp_path / "new" / "ours.pth"
    load_tool("convert_official").main([str(tmp_path / "official.pth"), str(target)])
    written = torch.load(target, weights_only=True)
    expected = convert_official(tensors)
    assert written["state_dict"].keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in written["state_dict"].items())
    assert written["meta"]["family"] == "vmamba"
    printed = capsys.readouterr().out
    assert "holds a VMamba of widths (8, 16, 32, 64)" in printed
    assert f"Converted {len(expected) - 2} tensors of backbone, 2 tensors of head." in printed


@pytest.mark.parametrize("tool", ["convert_official", "publish_model"])
def test_errors_are_one_sentence(tmp_path, tool):
    (tmp_path / "empty.pth").write_bytes(b"")
    for name, sentence in {"absent.pth": "error: There is no checkpoint", "empty.pth": "error: .* is empty"}.items():
        with pytest.raises(SystemExit, match=sentence):
            load_tool(tool).main([str(tmp_path / name), str(tmp_path / "out.pth")])
    assert not (tmp_path / "out.pth").exists()


def test_publish_model(tmp_path, capsys):
    state = {"backbone.a": torch.randn(3), "head.b": torch.randn(2)}
    meta = {"epoch": 3, "dataset_meta": {"classes": ("x",), "palette": np.array([[1, 2]]), "x": argparse.Namespace()}}
    run = {"state_dict": state, "meta": meta, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}}
    torch.save(run, tmp_path / "epoch_3.pth")
    load_tool("publish_model").main([str(tmp_path / "epoch_3.pth"), str(tmp_path / "published.pth")])
    (path,) = tmp_path.glob("published-*.pth")
    assert re.fullmatch(r"published-[0-9a-f]{8}\.pth", path.name)
    written = torch.load(path, weights_only=True)
    assert written.keys() == {"meta", "state_dict"}
    assert all(torch.equal(v, state[k]) for k, v in written["state_dict"].items())
    assert written["meta"]["epoch"] == 3
    assert written["meta"]["dataset_meta"] == {"classes": ["x"], "palette": [[1, 2]]}
    assert str(path) in capsys.readouterr().out
