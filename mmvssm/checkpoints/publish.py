"""Writing checkpoints that hold nothing but tensors and plain values."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PLAIN = (str, int, float, bool, type(None))


def save_plain(state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike, meta: Mapping | None = None) -> Path:
    """Save a state dict as `dict(meta=..., state_dict=...)` that `torch.load(weights_only=True)` reads everywhere.

    Args:
        state_dict: Names and tensors; copied to the CPU, each with storage of its own.
        path: Where to; folders are created.
        meta: Further information; values that are not plain (numbers, strings, lists, dicts of them) are left out.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in state_dict.items()}
    torch.save({"meta": plain(dict(meta or {})), "state_dict": tensors}, path)
    return path


def plain(value: Any) -> Any:
    """`value` in plain Python types: numpy values converted, entries of other classes left out of dicts and lists."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if isinstance(k, _PLAIN) and _is_plain(v)}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value if _is_plain(v)]
    return value


def add_hash(path: str | os.PathLike) -> Path:
    """Rename `name.pth` to `name-<first 8 digits of its SHA-256>.pth`, which torch checks after downloads."""
    path = Path(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"{path.stem}-{digest}{path.suffix}"))


def _is_plain(value: Any) -> bool:
    return isinstance(value, (*_PLAIN, np.generic, np.ndarray, Mapping, list, tuple))
