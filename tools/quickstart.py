"""From a fresh clone to a running project, with nothing but Python >= 3.10 and git.

    python3 tools/quickstart.py demo    # environment in .venv, installation, then tools/demo.py
    python3 tools/quickstart.py test    # the same environment, then lint and the tests

Arguments after the command go to tools/demo.py or to pytest. The environment is made once and reused; it is brought up
to date when pyproject.toml changes. uv installs in seconds where it can be had, pip in minutes where it cannot.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036  this script may be started by any Python
    sys.exit(f"mmvssm needs Python 3.10 or newer, and this is {platform.python_version()}")

ROOT = Path(__file__).resolve().parents[1]
# The set that the tests run with; torch on PyPI is the CUDA build and brings its own Triton of the same version.
TORCH = ["torch==2.13.0", "torchvision==0.28.0"]
TRITON = ["triton==3.7.1"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Processes that share the tests; each holds up to about 2 GB.
MAX_WORKERS = 4
# pip's setting -> uv's variable, because uv does not read pip's settings.
UV_SETTINGS = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("demo", "test", "install"), help="what to do after the installation")
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--torch", help=f"other torch packages, e.g. 'torch==2.11.0 torchvision==0.26.0' ({TORCH})")
    parser.add_argument("--line", choices=("openmmlab", "onedl"), default="openmmlab", help="which OpenMMLab packages")
    parser.add_argument("--installer", choices=("auto", "uv", "pip"), default="auto", help="auto: uv, else pip")
    return parser.parse_known_args()


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    """Show and run a command in the repository; returns its status."""
    print(f"$ {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


class Environment:
    """A virtual environment of this repository.

    Args:
        folder (Path): Where it is or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = str(self.bin / ("python.exe" if os.name == "nt" else "python"))
        self.stamp = folder / "mmvssm-installed"

    def install(self, requirements: list[str], installer: str) -> None:
        """Create it and install into it, unless that has been done for the same requirements."""
        wanted = self._fingerprint(requirements)
        if self.stamp.exists() and self.stamp.read_text() == wanted:
            print(f"{self.folder} is up to date")
            return
        start = time.perf_counter()
        self.create()
        done = installer != "pip" and self._install_by_uv(requirements)
        if not done and installer == "uv":
            sys.exit("the installation by uv failed; see above")
        if not done and run([self.python, "-m", "pip", "install", *self._cpu_index("pip"), *requirements]) != 0:
            sys.exit("the installation failed; see above")
        self.stamp.write_text(wanted)
        print(f"installed in {time.perf_counter() - start:.0f} s")

    def create(self) -> None:
        """Make the empty environment."""
        if Path(self.python).exists():
            return
        uv = shutil.which("uv")
        if uv is not None and run([uv, "venv", "--seed", "--python", sys.executable, str(self.folder)]) == 0:
            return
        if run([sys.executable, "-m", "venv", str(self.folder)]) != 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            sys.exit("no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv (or get uv)")

    def _install_by_uv(self, requirements: list[str]) -> bool:
        uv = shutil.which("uv") or self._uv_inside()
        if uv is None:
            print("uv is not to be had here; pip takes its place")
            return False
        env = {**self._uv_settings(), **os.environ}
        if run([uv, "pip", "install", "--python", self.python, *self._cpu_index("uv"), *requirements], env) == 0:
            return True
        print("uv did not succeed; pip takes its place")
        return False

    def _uv_inside(self) -> str | None:
        """uv in the environment itself, installed if need be."""
        if run([self.python, "-m", "pip", "install", "--quiet", "uv"]) != 0:
            return None
        return shutil.which("uv", path=str(self.bin))

    def _pip_settings(self) -> dict[str, str]:
        """pip's settings from its files and variables, e.g. ``{'find-links': '/wheels'}``."""
        command = [self.python, "-m", "pip", "config", "list"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        # Lines are sorted by name: ":env:.find-links='...'", "global.find-links='...'"; variables win over files.
        entries = [line.partition("=") for line in listed.splitlines()]
        entries.sort(key=lambda entry: entry[0].startswith(":env:"))
        return {name.rpartition(".")[2]: value.strip("'\"") for name, _, value in entries}

    def _uv_settings(self) -> dict[str, str]:
        settings = self._pip_settings()
        return {uv: settings[pip] for pip, uv in UV_SETTINGS.items() if pip in settings}

    def _cpu_index(self, installer: str) -> list[str]:
        """Options that let a Linux machine without GPU take torch's small CPU build, where it is within reach."""
        if platform.system() != "Linux" or has_gpu() or self._has_local_torch():
            return []
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
            options = ["--extra-index-url", CPU_INDEX]
            return options if installer == "pip" else [*options, "--index-strategy", "unsafe-best-match"]
        return []  # PyPI's CUDA build runs on a CPU too; it is merely larger

    def _has_local_torch(self) -> bool:
        folders = [Path(folder) for folder in self._pip_settings().get("find-links", "").split()]
        return any(folder.is_dir() and any(folder.glob("torch-*.whl")) for folder in folders)

    @staticmethod
    def _fingerprint(requirements: list[str]) -> str:
        parts = [" ".join(requirements), *((ROOT / name).read_text() for name in ("pyproject.toml", "setup.py"))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def test(environment: Environment, arguments: list[str]) -> int:
    """Lint, types and tests; runs all of them and returns 1 if one failed."""
    ruff = str(environment.bin / "ruff")
    steps = {
        "lint": [ruff, "check", "."],
        "format": [ruff, "format", "--check", "."],
        "types": [environment.python, "-m", "mypy"],
        "tests": [environment.python, "-m", "pytest", "-n", str(min(os.cpu_count() or 1, MAX_WORKERS)), *arguments],
    }
    results = {}
    for name, command in steps.items():
        start = time.perf_counter()
        status = run(command)
        results[name] = f"{'passed' if status == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s"
    print("\n".join(f"{name}: {result}" for name, result in results.items()))
    return int(any("FAILED" in result for result in results.values()))


def main() -> int:
    args, rest = parse_args()
    environment = Environment(ROOT / args.venv)
    torch = args.torch.split() if args.torch else TORCH + (TRITON if platform.system() == "Linux" else [])
    environment.install([*torch, "-e", f".[{args.line},test]"], args.installer)
    if args.command == "test":
        return test(environment, rest)
    if args.command == "demo":
        return run([environment.python, str(ROOT / "tools" / "demo.py"), *rest])
    print(f"ready: {environment.python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
