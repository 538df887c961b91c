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
