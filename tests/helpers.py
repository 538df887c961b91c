"""Helpers shared by the tests."""

import os
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
