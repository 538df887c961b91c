"""Inputs of the tests of the feature export."""

import pytest

from .feature_inputs import CONFIG, save_noise


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "micro.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven images of two sizes, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i, name in enumerate(["a.png", "b.png", "c.jpg", "d.png", "more/a.png", "more/b.png", "more/c.png"]):
        save_noise(folder / name, (40, 56) if i % 3 else (48, 32), i)
    return folder
