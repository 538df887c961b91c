"""Settings shared by all tests."""

import os
import sys
import zlib

os.environ.setdefault("MPLBACKEND", "Agg")
# Waiting OpenMP threads must not burn the cores that others need; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

import mmvssm  # noqa: F401  first, so that its import hooks are in place before any OpenMMLab library is imported

# Classes of MMEngine that keep named instances for the whole process: default scope, loggers, message hubs, ...
_GLOBAL_STATE = (
    ("mmengine.registry.default_scope", "DefaultScope"),
    ("mmengine.logging.logger", "MMLogger"),
    ("mmengine.logging.message_hub", "MessageHub"),
    ("mmengine.visualization.visualizer", "Visualizer"),
)


def _instance_tables():
    """Every class has a table of its own, derived ones (the libraries' visualizers) too."""
    classes = [getattr(sys.modules[module], name) for module, name in _GLOBAL_STATE if module in sys.modules]
    for cls in classes:
        yield cls._instance_dict
        classes.extend(cls.__subclasses__())


@pytest.fixture(autouse=True)
def _seed(request):
    """Random inputs depend on the test alone, so that a run without a GPU can be repeated; on a GPU they are fresh."""
    torch = sys.modules.get("torch")
    if torch is not None and request.node.get_closest_marker("gpu") is None:
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _restore_global_state():
    """A test may set a default scope or run a Runner without others noticing."""
    before = {id(table): dict(table) for table in _instance_tables()}
    yield
    for table in _instance_tables():
        known = before.get(id(table), {})
        table.clear()
        table.update(known)


def pytest_collection_modifyitems(config, items):
    """Tests marked ``gpu`` say why they do not run where there is no GPU."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))
