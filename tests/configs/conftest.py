"""Every config, parsed once for all tests of this folder."""

import functools
from pathlib import Path

import pytest

from tests.helpers import ROOT

CONFIGS = ROOT / "configs"
FAMILIES = sorted(folder.name for folder in CONFIGS.iterdir() if folder.is_dir() and not folder.name.startswith("_"))


def config_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (CONFIGS / folder).glob("*.py"))


@functools.cache
def _load(load, path):
    return load(path)


def keep_metafiles(patch: pytest.MonkeyPatch) -> None:
    """For every base config MMEngine reads all metafiles of the library anew, which takes most of the time."""
    from mmengine.config import utils

    patch.setattr(utils, "load", functools.partial(_load, utils.load))


@functools.cache
def parsed(file: Path):
    """The config, read once. Not to be changed."""
    from mmengine.config import Config

    with pytest.MonkeyPatch.context() as patch:
        keep_metafiles(patch)
        patch.delenv("MMVSSM_DATA", raising=False)
        return Config.fromfile(file)


@pytest.fixture(scope="session")
def every_data_set(tmp_path_factory) -> Path:
    """A folder with ``data``, in which miniatures lie where the configs look for their data sets."""
    pytest.importorskip("mmdet", reason="needs mmdet")
    from tests.tools import miniature

    return miniature.make_everything(tmp_path_factory.mktemp("everything"))


@pytest.fixture
def runner_of(every_data_set, tmp_path, monkeypatch):
    """A function from a shrunk config to its runner and watch; the work folder is ``tmp_path``."""
    from tests.configs.running import make_runner

    monkeypatch.chdir(every_data_set)
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)  # asks compilers for their versions
    return functools.partial(make_runner, work_dir=tmp_path)
