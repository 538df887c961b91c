import importlib

import pytest

from tests.compat.fresh_python import run_python, write_package

# Behaves like PyPI's torchvision beside a CPU build of torch: a submodule registers a meta function for an operator
# that nobody has defined.
FAKE = {
    "torchvision/__init__.py": "from torchvision import extension, _meta_registrations\nready = True\n",
    "torchvision/extension.py": "def _has_ops():\n    return False\n",
    "torchvision/_meta_registrations.py": (
        "import torch\n"
        "@torch.library.register_fake('torchvision::nms')\n"
        "def meta_nms(dets, scores, iou_threshold):\n    return scores\n"
    ),
}


def test_import_without_compiled_part(tmp_path):
    write_package(tmp_path, FAKE)
    broken = "try:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)\n"
    assert "operator torchvision::nms does not exist" in run_python(broken, tmp_path)
    out = run_python(
        "import mmvssm, sys, torchvision\n"
        "assert torchvision.ready and sys.modules['torchvision'] is torchvision\n"
        "assert type(torchvision.__loader__).__name__ == 'SourceFileLoader'\n"
        "from mmvssm.compat.mmcv_ext import stand_in_source\n"
        "print(stand_in_source(), '|', mmvssm.compat.summary())\n",
        tmp_path,
    )
    assert "plain torch | mmvssm compatibility: torchvision import (" in out


def test_sound_torchvision_is_left_alone(tmp_path):
    write_package(tmp_path, {"torchvision/__init__.py": "ready = True\n"})
    out = run_python(
        "import mmvssm, torchvision, sys\nprint('torch' in sys.modules, mmvssm.compat.summary())", tmp_path
    )
    assert out.strip() == "False mmvssm compatibility: nothing active"


@pytest.mark.parametrize("error", ["RuntimeError('something else')", "ImportError('no such file')"])
def test_other_errors_are_not_hidden(tmp_path, error):
    write_package(tmp_path, {"torchvision/__init__.py": f"raise {error}\n"})
    out = run_python(
        "import mmvssm\ntry:\n    import torchvision\nexcept Exception as e:\n    print(repr(e))", tmp_path
    )
    assert out.strip() == error


def test_installed_torchvision_imports():
    pytest.importorskip("torchvision", reason="needs the extra 'openmmlab'")
    for module in ("torchvision.transforms.v2", "torchvision.models", "torchvision.ops.boxes"):
        importlib.import_module(module)
