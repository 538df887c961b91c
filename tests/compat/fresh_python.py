"""Run code in a Python of its own, because import hooks act once per process."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT


def run_python(code: str, *first_on_path: Path, **environment: str) -> str:
    """Standard output and error of ``code``; fails the test when it ends with an error.

    Args:
        code (str): Python source.
        *first_on_path (Path): Folders searched before everything else, e.g. with fake packages.
        **environment (str): Additional variables.
    """
    path = [str(folder) for folder in (*first_on_path, ROOT, ROOT / "kernels")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_package(folder: Path, files: dict[str, str]) -> Path:
    """Write files (relative path -> text) below ``folder`` and return it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
