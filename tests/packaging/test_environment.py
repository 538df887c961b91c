import pytest

from mmvssm import compat
from mmvssm.utils import collect_environment, environment_report, find_problems
from tests.compat.fresh_python import run_python

UPSTREAM = {
    "torch": {"torch": "2.13.0+cpu"},
    "torchvision": {"torchvision": "0.28.0"},
    "triton": {"triton": "3.7.1"},
    "mmengine": {"mmengine": "0.10.7"},
    "mmcv": {"mmcv-lite": "2.1.0"},
    "mmdet": {"mmdet": "3.3.0"},
    "mmseg": {"mmsegmentation": "1.2.2"},
}


def test_supported_set_has_no_problems():
    assert find_problems(UPSTREAM) == []
    assert find_problems({}) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"mmcv": {"mmcv": "2.2.0"}}, ["mmdet 3.3.0 refuses mmcv 2.2.0", "mmsegmentation 1.2.2 refuses mmcv 2.2.0"]),
        ({"mmcv": {"mmcv": "2.1.0", "mmcv-lite": "2.1.0"}}, ["write the same folder mmcv"]),
        ({"mmengine": {"mmengine": "0.10.7", "onedl-mmengine": "0.10.12"}}, ["write the same folder mmengine"]),
        ({"torch": {"torch": "2.5.1"}}, ["torch 2.5.1 is too old", "install torchvision 0.20"]),
        ({"triton": {"triton": "3.0.0"}}, ["triton 3.0.0 is too old: 3.2 or newer"]),
        ({"torchvision": {"torchvision": "0.27.1"}}, ["torchvision 0.27.1 does not belong to torch 2.13.0+cpu"]),
        ({"torch": {"torch": "2.15.0"}, "torchvision": {"torchvision": "0.29.2"}}, []),
        ({"torch": {"torch": "2.15.0a0+git"}, "torchvision": {"torchvision": "0.29.1"}}, ["install torchvision 0.30"]),
        ({"mmcv": {"onedl-mmcv": "2.3.6"}, "mmdet": {"onedl-mmdetection": "3.5.1"}, "mmseg": {}}, []),
    ],
)
def test_known_bad_pairs(changed, expected):
    found = find_problems({**UPSTREAM, **changed})
    assert len(found) == len(expected)
    for sentence, part in zip(found, expected, strict=True):
        assert part in sentence


def test_report_without_imports():
    report = collect_environment(probe=False)
    assert list(report) == ["Versions", "Devices", "Operators", "Imports", "Compatibility pieces", "Problems"]
    assert report["Versions"]["torch"] != "not installed"
    assert "mmcv operators" in report["Compatibility pieces"]
    assert report["Operators"]["on cpu"].startswith("torch (")


def test_report_names_the_backend_asked_for(monkeypatch):
    monkeypatch.setenv("MMVSSM_BACKEND", "reference")
    assert collect_environment(probe=False)["Operators"]["on cpu"] == "reference (asked for by MMVSSM_BACKEND)"
    monkeypatch.setenv("MMVSSM_BACKEND", "cuda")
    assert "MMVSSM_BACKEND must be one of" in environment_report(probe=False)


def test_script_prints_the_report_and_imports_the_libraries():
    """Every compatibility piece is listed with its reason, and a library that is missing or broken does not end it."""
    out = run_python(
        "import runpy, sys; sys.argv = ['x']; runpy.run_path('tools/misc/check_env.py', run_name='__main__')"
    )
    for title in ("Versions", "Devices", "Operators", "Imports", "Compatibility pieces", "Problems"):
        assert f"\n{title}\n" in f"\n{out}"
    assert out.count("Why it exists:") == len(compat.all_pieces())
