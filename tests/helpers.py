"""Helpers shared by the tests."""

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_dir(*parts: str) -> Path:
    """Folder of reference outputs and data kept outside the repository; skips the test when it is absent."""
    root = Path(os.environ.get("MMVSSM_SHARED", ROOT.parent / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference data {'/'.join(parts)} not found beside the checkout (set MMVSSM_SHARED)")
    return path


@cache
def golden_fill():
    """The module that makes the deterministic weights and images."""
    spec = importlib.util.spec_from_file_location("golden_fill", shared_dir("golden", "fill.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
