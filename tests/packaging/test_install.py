"""Source distribution, wheel and editable install, the latter two in a clean environment."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT

# What a build reads; work_dirs, data and environments stay where they are.
PARTS = (
    "mmvssm",
    "kernels",
    "configs",
    "tools",
    "docs",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "model-index.yml",
    "mkdocs.yml",
)
PARTS += ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
CONFIG = "vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"
CHECK = f"""
import pathlib, sys, tempfile
import mmvssm, mmvssm_kernels
print("at", mmvssm.__file__, mmvssm_kernels.__file__)
assert len(mmvssm.list_models()) > 10
assert mmvssm.get_backbone("vmamba-tiny-s1l8").out_channels[-1] == 768
from mmengine.config import Config
path = pathlib.Path(tempfile.mkdtemp(), "config.py")
path.write_text("_base_ = 'mmvssm::{CONFIG}'")
assert Config.fromfile(str(path)).model.backbone.type == "mmvssm.VMamba"
"""


def run(*command, cwd=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind, source, out):
    """Path of the ``sdist`` or ``wheel`` that the build backend makes of a source folder."""
    code = f"from setuptools import build_meta; print('built', build_meta.build_{kind}({str(out)!r}))"
    return out / run(sys.executable, "-c", code, cwd=source).split()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that builds write nothing into it."""
    folder = tmp_path_factory.mktemp("source") / "mmvssm"
    folder.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".mim"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source distribution, which therefore has to be complete."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, unpacked)
    return build("wheel", next(unpacked.iterdir()), tmp_path_factory.mktemp("wheel"))


def files_of(folder, *patterns):
    found = {path for pattern in patterns for path in folder.rglob(pattern) if "__pycache__" not in path.parts}
    return {path.relative_to(folder).as_posix() for path in found}


def test_wheel_holds_the_packages_and_mim(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"mmvssm/{name}" for name in files_of(ROOT / "mmvssm", "*.py") if not name.startswith(".mim/")}
    expected |= {f"mmvssm_kernels/{name}" for name in files_of(ROOT / "kernels" / "mmvssm_kernels", "*.py")}
    expected |= {f"mmvssm/.mim/configs/{name}" for name in files_of(ROOT / "configs", "*.py", "*.yml")}
    expected |= {f"mmvssm/.mim/tools/{name}" for name in files_of(ROOT / "tools", "*.py", "*.sh")}
    assert expected <= names
    assert "mmvssm/.mim/model-index.yml" in names
    strangers = {name for name in names if not name.startswith(("mmvssm/", "mmvssm_kernels/", "mmvssm-"))}
    assert not strangers, "only the two packages may be installed, kernels/benchmarks and tests not"
    assert not {name for name in names if "__pycache__" in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_openmmlab_is_never_a_hard_requirement(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: numpy", "Requires-Dist: torch>=2.6"]


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """Python of an environment that holds the wheel with its extra 'openmmlab' and nothing else."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "tools" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    environment = quickstart.Environment(tmp_path_factory.mktemp("clean") / "venv")
    same = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    environment.install([*same, f"{wheel}[openmmlab]"], "auto")
    return environment.python


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(clean_python, tmp_path):
    out = run(clean_python, "-I", "-c", CHECK, cwd=tmp_path)
    mmvssm, kernels = (Path(path) for path in out.split()[1:3])
    assert mmvssm.parents[1] == kernels.parents[1]
    assert mmvssm.parents[1].name == "site-packages"


@pytest.mark.slow
def test_editable_install_works(clean_python, source, tmp_path):
    """By pip, over the wheel that uv (where there is one) has installed."""
    run(clean_python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", source)
    out = run(clean_python, "-I", "-c", CHECK, cwd=tmp_path)
    assert out.split()[1:3] == [
        str(source / "mmvssm" / "__init__.py"),
        str(source / "kernels" / "mmvssm_kernels" / "__init__.py"),
    ]
    linked = source / "mmvssm" / ".mim" / "configs"
    assert linked.is_symlink()
    assert linked.resolve() == source / "configs"
    added = source / "configs" / "vmamba" / "added-later.py"
    added.write_text("value = 1\n")
    code = "import mmvssm; from mmengine.utils import get_installed_path as p; print(p('mmvssm'))"
    assert (Path(run(clean_python, "-I", "-c", code).strip()) / ".mim/configs/vmamba/added-later.py").exists()
