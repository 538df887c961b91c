import importlib.util
import os
import sys

import pytest

pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")

import mmengine.config.config
import mmengine.hub.hub
import mmengine.utils
from mmengine.config import Config

from mmvssm.compat import installed_path
from tests.compat.fresh_python import run_python, write_package

LIBRARIES = {"mmdet": "mmdet", "mmsegmentation": "mmseg", "mmpretrain": "mmpretrain", "mmvssm": "mmvssm"}


def folder_of(module):
    spec = importlib.util.find_spec(module)
    if spec is None:
        pytest.skip(f"{module} is not installed")
    return os.path.dirname(spec.origin)


@pytest.mark.parametrize(("distribution", "module"), LIBRARIES.items())
def test_folder_of_distribution_and_module(distribution, module):
    assert installed_path.get_installed_path(distribution) == folder_of(module)
    assert installed_path.get_installed_path(module) == folder_of(module)
    assert installed_path.is_installed(distribution)


def test_mmengine_uses_the_replacements():
    for holder in (mmengine.utils, mmengine.utils.package_utils, mmengine.config.config):
        assert holder.get_installed_path is installed_path.get_installed_path
        assert holder.is_installed is installed_path.is_installed
    assert mmengine.hub.hub.get_installed_path is installed_path.get_installed_path


def test_missing_package_is_a_sentence():
    assert not installed_path.is_installed("mmnothing")
    with pytest.raises(ModuleNotFoundError, match="mmnothing is not installed"):
        installed_path.get_installed_path("mmnothing")


def test_namespace_package_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="namespace package"):
        installed_path.get_installed_path("only_a_folder")
    assert not installed_path.is_installed("only_a_folder")


def test_distribution_with_another_name(tmp_path, monkeypatch):
    """As with onedl-mmsegmentation: the distribution's own list of modules decides."""
    files = {
        "some_module/__init__.py": "",
        "odd_name-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: odd-name\nVersion: 1.0\n",
        "odd_name-1.0.dist-info/top_level.txt": "some_module\n",
    }
    monkeypatch.syspath_prepend(write_package(tmp_path, files))
    assert installed_path.get_installed_path("odd-name") == str(tmp_path / "some_module")


@pytest.mark.parametrize(
    ("library", "base"),
    [
        ("mmdet", "mmdet::_base_/models/mask-rcnn_r50_fpn.py"),
        ("mmseg", "mmseg::_base_/models/upernet_swin.py"),
        ("mmpretrain", "mmpretrain::_base_/default_runtime.py"),
    ],
)
def test_bases_of_the_libraries(tmp_path, library, base):
    folder_of(library)
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = '{base}'\nmarker = 1\n")
    config = Config.fromfile(str(path))
    assert config.marker == 1
    assert len(config) > 1


def test_bases_without_pkg_resources(tmp_path):
    """As with setuptools >= 82, and with mmengine imported before mmvssm."""
    folder_of("mmdet")
    config = tmp_path / "config.py"
    config.write_text("_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'\n")
    code = (
        "import sys\nsys.modules['pkg_resources'] = None\n"
        "{imports}\n"
        f"print(mmengine.config.Config.fromfile({str(config)!r}).model.type)\n"
    )
    for imports in ("import mmvssm, mmengine.config", "import mmengine.config, mmengine.hub, mmvssm"):
        assert "MaskRCNN" in run_python(code.format(imports=imports))


def test_scope_is_known_to_mmengine():
    from mmengine.config.utils import MODULE2PACKAGE

    assert MODULE2PACKAGE["mmvssm"] == "mmvssm"
    assert "mmvssm" in sys.modules
