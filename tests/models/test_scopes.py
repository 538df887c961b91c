"""Configs name the backbone as 'mmvssm.VMamba' in any library, without custom_imports."""

import subprocess
import sys

SCRIPT = """
import importlib
import sys
import torch
from mmengine.registry import MODELS, DefaultScope

config = dict(type="mmvssm.VMamba", arch=dict(embed_dims=8, depths=(1, 1)), out_indices=(0, 1))


def build(scope, registry):
    with DefaultScope.overwrite_default_scope(scope):
        net = registry.build(dict(config))
    print("built", scope, type(net).__module__, [tuple(o.shape) for o in net(torch.zeros(1, 3, 16, 24))])


assert "mmvssm" not in sys.modules
build("mmengine", MODELS)  # mmengine finds the package by the scope
for library in ("mmdet", "mmseg", "mmpretrain"):
    build(library, importlib.import_module(f"{library}.registry").MODELS)
"""


def test_default_scopes_of_the_libraries():
    """In a process of its own, where nothing has imported mmvssm before."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("built")]
    shapes = "mmvssm.models.backbones.vmamba [(1, 8, 4, 6), (1, 16, 2, 3)]"
    assert lines == [f"built {scope} {shapes}" for scope in ("mmengine", "mmdet", "mmseg", "mmpretrain")]
