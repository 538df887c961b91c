"""Packages and the ``.mim`` folder; everything else about the distribution is in pyproject.toml.

``mmvssm/.mim`` holds ``configs``, ``tools`` and ``model-index.yml``, where MMEngine (``_base_ = 'mmvssm::...'``) and
MIM look for them. An editable install links them, so that edits count at once; a wheel contains copies.
"""

import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).resolve().parent
MIM_PARTS = ("configs", "tools", "model-index.yml")


def copy_part(source: Path, target: Path) -> None:
    """Copy a file or folder without byte code; what stands at the target is replaced."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"), dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def link_mim() -> None:
    """Link the parts into the package of this checkout; copies where links are not allowed (Windows)."""
    folder = ROOT / "mmvssm" / ".mim"
    folder.mkdir(exist_ok=True)
    for part in MIM_PARTS:
        source, target = ROOT / part, folder / part
        if not source.exists():
            continue
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        try:
            target.symlink_to(os.path.relpath(source, folder), target_is_directory=source.is_dir())
        except OSError:
            copy_part(source, target)


class BuildPy(build_py):
    """Builds the packages; adds ``.mim`` to a wheel, links it for an editable install."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            link_mim()
            return
        folder = Path(self.build_lib) / "mmvssm" / ".mim"
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier build left
        folder.mkdir(parents=True)
        for part in MIM_PARTS:
            if (ROOT / part).exists():
                copy_part(ROOT / part, folder / part)


class Develop(develop):
    """``setup.py develop`` of older tools."""

    def run(self) -> None:
        link_mim()
        super().run()


setup(
    packages=[
        *find_packages(include=["mmvssm", "mmvssm.*"]),
        *find_packages("kernels", include=["mmvssm_kernels", "mmvssm_kernels.*"]),
    ],
    package_dir={"mmvssm_kernels": "kernels/mmvssm_kernels"},
    cmdclass={"build_py": BuildPy, "develop": Develop},
)
