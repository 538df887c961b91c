"""What may import what."""

import ast

import pytest

from tests.compat.fresh_python import run_python
from tests.helpers import ROOT

KERNELS = ROOT / "kernels" / "mmvssm_kernels"
OPENMMLAB = {"mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"}
FOREIGN = {"einops", "timm", "mamba_ssm", "causal_conv1d", "fla"}


def imported_packages(path):
    """Top-level packages that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def files_below(folder):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize("path", files_below(KERNELS))
def test_kernels_know_nothing_of_openmmlab(path):
    assert not imported_packages(path) & (OPENMMLAB | FOREIGN | {"mmvssm"})


@pytest.mark.parametrize("path", files_below(ROOT / "mmvssm" / "models"))
def test_models_need_torch_and_mmengine_only(path):
    assert not imported_packages(path) & ((OPENMMLAB - {"mmengine"}) | FOREIGN | {"triton"})


def test_import_of_the_kernels_is_light():
    forbidden = sorted(OPENMMLAB | FOREIGN | {"mmvssm", "triton"})
    out = run_python(
        "import sys, mmvssm_kernels\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        f"print(sorted(loaded & set({forbidden})), 'torch' in loaded)\n"
    )
    assert out.strip().endswith("[] True")


def test_kernels_folder_is_no_package():
    """A package called ``kernels`` would hide the one of that name on PyPI."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_block_pointers():
    """Gone from Triton 3.9."""
    for path in KERNELS.rglob("*.py"):
        assert "make_block_ptr" not in path.read_text(), path
