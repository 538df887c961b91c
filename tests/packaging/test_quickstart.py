import importlib.util
import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "tools" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(quickstart, tmp_path):
    """An environment that exists already: this one."""
    environment = quickstart.Environment(tmp_path)
    environment.python = sys.executable
    return environment


def commands(quickstart, monkeypatch, *failing):
    """Record the commands instead of running them; those that contain a word of ``failing`` fail."""
    seen = []

    def run(command, env=None):
        seen.append((" ".join(command), env))
        return int(any(word in " ".join(command) for word in failing))

    monkeypatch.setattr(quickstart, "run", run)
    return seen


def test_installs_once_for_the_same_requirements(quickstart, environment, monkeypatch):
    seen = commands(quickstart, monkeypatch)
    environment.install(["-e", "."], "auto")
    first = len(seen)
    assert "pip install" in seen[-1][0]
    environment.install(["-e", "."], "auto")
    assert len(seen) == first
    environment.install(["-e", ".[test]"], "auto")
    assert len(seen) > first


def test_pip_takes_the_place_of_uv(quickstart, environment, monkeypatch):
    monkeypatch.setattr(quickstart.shutil, "which", lambda name, path=None: "/bin/uv" if name == "uv" else None)
    seen = commands(quickstart, monkeypatch, "/bin/uv")
    environment.install(["numpy"], "auto")
    assert [line.split()[0] for line, _ in seen] == ["/bin/uv", sys.executable]
    assert environment.stamp.exists()


def test_failed_installation_is_not_remembered(quickstart, environment, monkeypatch):
    commands(quickstart, monkeypatch, "install")
    with pytest.raises(SystemExit, match="the installation failed"):
        environment.install(["numpy"], "pip")
    assert not environment.stamp.exists()


def test_uv_gets_the_settings_of_pip(environment, monkeypatch, tmp_path):
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment was made without pip")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert environment._uv_settings()["UV_FIND_LINKS"] == str(tmp_path)


def test_cpu_build_is_not_looked_for_where_there_is_a_wheel_or_a_gpu(quickstart, environment, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise OSError

    asked = []
    monkeypatch.setattr(quickstart.platform, "system", lambda: "Linux")
    monkeypatch.setattr(quickstart, "has_gpu", lambda: False)
    monkeypatch.setattr(environment, "_pip_settings", lambda: {"find-links": str(tmp_path)})
    monkeypatch.setattr(quickstart.urllib.request, "urlopen", lambda *a, **k: asked.append(a) or open(__file__))  # noqa: SIM115
    assert environment._cpu_index("pip") == ["--extra-index-url", quickstart.CPU_INDEX]
    assert "--index-strategy" in environment._cpu_index("uv")
    assert len(asked) == 2
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    assert environment._cpu_index("pip") == []
    monkeypatch.setattr(environment, "_has_local_torch", lambda: False)
    monkeypatch.setattr(quickstart, "has_gpu", lambda: True)
    assert environment._cpu_index("pip") == []
    assert len(asked) == 2
    monkeypatch.setattr(quickstart, "has_gpu", lambda: False)
    monkeypatch.setattr(quickstart.urllib.request, "urlopen", unreachable)
    assert environment._cpu_index("pip") == []


@pytest.mark.parametrize(("failing", "status"), [((), 0), (("format",), 1), (("mypy",), 1), (("pytest",), 1)])
def test_every_check_runs_and_one_failure_counts(quickstart, environment, monkeypatch, failing, status):
    seen = commands(quickstart, monkeypatch, *failing)
    monkeypatch.setattr(quickstart.os, "cpu_count", lambda: 2)
    assert quickstart.test(environment, ["-x"]) == status
    assert len(seen) == 4
    assert seen[-1][0].endswith("-m pytest -n 2 -x")


def test_help_and_unknown_command():
    script = str(ROOT / "tools" / "quickstart.py")
    assert "tools/demo.py" in subprocess.run([sys.executable, script, "-h"], capture_output=True, text=True).stdout
    wrong = subprocess.run([sys.executable, script, "tests"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "invalid choice: 'tests'" in wrong.stderr
