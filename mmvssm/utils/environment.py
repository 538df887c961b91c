"""Report on the environment: versions, devices, operator backend, compatibility pieces, pairs that do not work."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable

from mmvssm import compat
from mmvssm.version import __version__

# Import name -> distributions that provide it, upstream first.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "triton": ("triton",),
    "numpy": ("numpy",),
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmcv": ("mmcv", "mmcv-lite", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
    "transformers": ("transformers",),
    "setuptools": ("setuptools",),
}
# Importing these lets every compatibility piece that is needed show itself.
_PROBES = ("mmengine.runner", "torchvision", "mmcv.ops", "mmpretrain.models", "mmdet.models", "mmseg.models")

Report = dict[str, dict[str, str]]


def environment_report(probe: bool = True) -> str:
    """The report as text, for bug reports and ``tools/misc/check_env.py``.

    Args:
        probe (bool): Import the OpenMMLab libraries (about ten seconds) so that the compatibility pieces show what they
            do; otherwise their state is what the process has imported so far. Default: True.

    Returns:
        str: Sections with one ``name: value`` line each.
    """
    lines = []
    for title, entries in collect_environment(probe).items():
        lines.append(title)
        width = max((len(name) for name in entries), default=0)
        lines += [f"  {name + ':':<{width + 1}} {value}" for name, value in entries.items()] or ["  none"]
    return "\n".join(lines)


def collect_environment(probe: bool = True) -> Report:
    """The report as a dict of sections, each a dict of texts.

    Args:
        probe (bool): See :func:`environment_report`.
    """
    imports = {name: _import_state(name) for name in _PROBES} if probe else {}
    return {
        "Versions": _versions(),
        "Devices": _devices(),
        "Operators": _operators(),
        "Imports": imports,
        "Compatibility pieces": _pieces(),
        "Problems": {f"{number}": text for number, text in enumerate(find_problems(), 1)},
    }


def installed_versions() -> dict[str, dict[str, str]]:
    """Import name -> {distribution: version} of everything relevant that is installed."""
    found: dict[str, dict[str, str]] = {}
    for module, names in _DISTRIBUTIONS.items():
        found[module] = {}
        for name in names:
            try:
                found[module][name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def find_problems(versions: dict[str, dict[str, str]] | None = None) -> list[str]:
    """Sentences about combinations that are known not to work and that no compatibility piece cures.

    Args:
        versions (dict, optional): As :func:`installed_versions` returns, which is the default.
    """
    versions = installed_versions() if versions is None else versions
    return [text for check in _CHECKS for text in check(versions)]


def _versions() -> dict[str, str]:
    entries = {"mmvssm": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    for module, found in installed_versions().items():
        entries[module] = ", ".join(f"{v} ({d})" if d != module else v for d, v in found.items()) or "not installed"
    return entries


def _devices() -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        return {"torch": f"cannot be imported: {error}"}
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built}, but sees no usable GPU or driver" if built else "torch is a CPU build"
        return {"GPU": f"none ({why})", "CPU threads": str(torch.get_num_threads())}
    entries = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        entries[f"GPU {index}"] = (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        )
    entries["CUDA" if torch.version.cuda else "ROCm"] = str(torch.version.cuda or torch.version.hip)
    return entries


def _operators() -> dict[str, str]:
    """Which backend of mmvssm_kernels serves which device, and why."""
    try:
        import torch

        from mmvssm_kernels import dispatch
    except ImportError as error:
        return {"mmvssm_kernels": f"cannot be imported: {error}"}
    try:
        requested = dispatch.requested_backend("auto")
    except ValueError as error:
        return {"mmvssm_kernels": str(error)}
    entries = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        available = dispatch.available_backends(device)
        chosen = available[0] if requested == "auto" else requested
        if requested != "auto":
            why = "asked for by MMVSSM_BACKEND"
            if requested not in available:
                why += f", but cannot serve this device: use one of {', '.join(available)}"
        elif chosen == "triton":
            why = "the fastest there is for this device"
        elif device == "cuda":
            why = "Triton is not installed; pip install triton (Linux) makes it many times faster"
        else:
            why = "Triton kernels need a GPU"
        entries[f"on {device}"] = f"{chosen} ({why})"
    return entries


def _import_state(name: str) -> str:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a broken library must not end the report that is to explain it
        text = " ".join(str(error).split())
        return f"FAILS with {type(error).__name__}: {text[:200]}"
    return "imports"


def _pieces() -> dict[str, str]:
    entries = {}
    for piece in compat.all_pieces():
        state = "active" if piece.active else "not active"
        detail = f": {piece.detail}" if piece.detail else " (what it concerns has not been imported)"
        entries[piece.name] = f"{state}{detail}. Why it exists: {piece.reason}. Goes when {piece.until}."
    return entries


def _release(version: str | None) -> tuple[int, ...]:
    """Leading numbers of a version, () if unknown: ``'2.13.0+cpu'`` -> (2, 13, 0)."""
    numbers = []
    for part in (version or "").split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _any(versions: dict[str, dict[str, str]], module: str) -> str | None:
    return next(iter(versions.get(module, {}).values()), None)


def _check_minimum(versions: dict[str, dict[str, str]]) -> list[str]:
    found = []
    for module, least in (("torch", (2, 6)), ("triton", (3, 2)), ("mmengine", (0, 10)), ("mmcv", (2, 0))):
        have = _any(versions, module)
        if have is not None and _release(have) < least:
            found.append(f"{module} {have} is too old: {'.'.join(map(str, least))} or newer is needed")
    return found


def _check_mmcv(versions: dict[str, dict[str, str]]) -> list[str]:
    found = []
    mmcv = _any(versions, "mmcv")
    if mmcv is not None and _release(mmcv) >= (2, 2):
        for module, distribution, broken in (("mmdet", "mmdet", (3, 3, 0)), ("mmseg", "mmsegmentation", (1, 2, 2))):
            have = versions.get(module, {}).get(distribution)
            if have is not None and _release(have) <= broken:
                found.append(f"{distribution} {have} refuses mmcv {mmcv} when imported; use mmcv or mmcv-lite 2.1.0")
    return found


def _check_twins(versions: dict[str, dict[str, str]]) -> list[str]:
    found = []
    for module, installed in versions.items():
        if len(installed) > 1:
            both = " and ".join(f"{name} {version}" for name, version in installed.items())
            found.append(
                f"{both} are both installed and write the same folder {module}; the last one installed has overwritten "
                "the other: uninstall both, then install one"
            )
    return found


def _check_torchvision(versions: dict[str, dict[str, str]]) -> list[str]:
    torch, torchvision = _release(_any(versions, "torch")), _release(_any(versions, "torchvision"))
    if len(torch) < 2 or len(torchvision) < 2:
        return []
    # torchvision 0.(n + 15) belongs to torch 2.n; from 0.29.2 on one build serves every torch >= 2.14.
    if torch[0] == 2 and torchvision[0] == 0 and torchvision[1] != torch[1] + 15:
        if torchvision >= (0, 29, 2) and torch >= (2, 14):
            return []
        return [
            f"torchvision {_any(versions, 'torchvision')} does not belong to torch {_any(versions, 'torch')}; "
            f"install torchvision 0.{torch[1] + 15}"
        ]
    return []


_CHECKS: tuple[Callable[[dict[str, dict[str, str]]], list[str]], ...] = (
    _check_minimum,
    _check_mmcv,
    _check_twins,
    _check_torchvision,
)
