"""The tools as modules, their data and finished runs, shared by the tests."""

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.configs.conftest import keep_metafiles
from tests.conftest import _instance_tables
from tests.helpers import ROOT
from tests.tools import miniature


@functools.cache
def load_tool(path: str) -> ModuleType:
    """``tools/<path>.py`` as a module (the folder is no package)."""
    file = ROOT / "tools" / f"{path}.py"
    spec = importlib.util.spec_from_file_location(f"tool_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _keep_metafiles(monkeypatch):
    keep_metafiles(monkeypatch)


def clear_instances() -> None:
    """Before another run in the same process: MMEngine would hand it the visualizer and logger of the one before."""
    for table in _instance_tables():
        table.clear()


def in_fresh_state(main):
    """A tool's main function for several runs in one process."""

    def run(argv):
        clear_instances()
        return main(argv)

    return run


@pytest.fixture
def train():
    return in_fresh_state(load_tool("train").main)


@pytest.fixture
def evaluate():
    return in_fresh_state(load_tool("test").main)


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory) -> Path:
    return miniature.make_class_folders(tmp_path_factory.mktemp("classes") / "tinyimagenet20")


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory) -> Path:
    return miniature.make_ade20k(tmp_path_factory.mktemp("ade"))


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    pytest.importorskip("mmdet", reason="needs mmdet")
    return miniature.make_coco(tmp_path_factory.mktemp("coco") / "coco")


def scalars(work_dir: Path) -> list[dict]:
    """What a training run logged, in order."""
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(work_dir: Path) -> dict:
    """What a test run logged."""
    file = max(work_dir.glob("*/*.json"))
    return json.loads(file.read_text())
