"""Opening checkpoint files without executing anything in them."""

import contextlib
import os
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import torch

from mmvssm.checkpoints import unpickle
from mmvssm.checkpoints.download import download

_PICKLE_MODULE = types.SimpleNamespace(
    __name__="mmvssm.checkpoints.unpickle", Unpickler=unpickle.Unpickler, load=unpickle.load
)
_NOT_A_CHECKPOINT = (
    ((b"<!doctype", b"<html", b"<head", b"<?xml"), "is a web page, not a checkpoint (did the download fail?)"),
    ((b"version https://git-lfs",), "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    ((b"\x89hdf",), "is an HDF5 file, not a PyTorch checkpoint"),
    ((b"\x1f\x8b",), "is gzip-compressed; unpack it first"),
)


class RefusedFileError(ValueError):
    """A file that is whole, but asks for more than data."""


def load_file(path: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """Open a checkpoint (.pth, .pt, .pth.tar, ... or .safetensors) without executing pickled code.

    Both of torch's file layouts (zip and legacy) are read by a restricted unpickler: tensors, numpy values and plain
    containers are rebuilt, MMEngine's `HistoryBuffer` comes back as a working object, objects of other classes become
    inert `StandIn`s, and a file that asks for anything else is refused.

    Args:
        path: The file.
        map_location: As in `torch.load`. Default: 'cpu'.

    Returns:
        What was saved; usually a dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, truncated, no checkpoint, or asks to run code.
        ImportError: It is a .safetensors file and safetensors is not installed.
    """
    path = Path(os.fspath(path)).expanduser()
    _check_is_file(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path, map_location)
    with path.open("rb") as file:
        start = file.read(512)
    for beginnings, sentence in _NOT_A_CHECKPOINT:
        if start.lstrip().lower().startswith(beginnings):
            raise ValueError(f"{path} {sentence}.")
    if start.startswith(b"PK\x03\x04"):
        _check_zip(path)
    elif tarfile.is_tarfile(path):
        raise ValueError(f"{path} is a tar archive (the layout of torch before 0.2), which is not read; save it anew.")
    try:
        return _load_pickled(path, map_location)
    except unpickle.RefusedError as error:
        raise RefusedFileError(
            f"{path} is refused because it holds more than data: {_printable(error)}. Nothing of it was executed. If "
            "you trust its source, open it elsewhere with torch.load(weights_only=False) and save its tensors alone."
        ) from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "deserialize object on" in str(error):  # torch's words for a device that this machine lacks
            raise ValueError(f"{path} holds tensors of a device that is not here; give map_location='cpu'.") from error
        raise ValueError(f"{path} is truncated, damaged or no PyTorch checkpoint ({_printable(error)}).") from error


def read_checkpoint(source: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """Open a checkpoint given by path or by http(s) / file URL; see `download` for URLs.

    Args:
        source: Path or URL.
        map_location: As in `torch.load`.

    Returns:
        What was saved, see `load_file`.

    Raises:
        ValueError, FileNotFoundError: As `load_file` and `download`.
    """
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        source = download(source, check_name=True)
    elif source.startswith("file://"):
        source = source.removeprefix("file://")
    return load_file(source, map_location)


def check_whole(path: Path) -> None:
    """Raise ValueError if a file is no checkpoint, or cut short or damaged as far as its format can tell.

    Archives, which torch writes since 1.6, have checksums of all they hold; of others only the structure shows damage.
    """
    _check_is_file(path)
    if not zipfile.is_zipfile(path):
        with contextlib.suppress(RefusedFileError):  # whole, and what it asks for concerns who opens it
            load_file(path)
        return
    _check_zip(path)
    with zipfile.ZipFile(path) as archive:
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise ValueError(f"{path} is truncated or damaged ({error}).") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} in it is wrong.")


def _load_pickled(path: Path, map_location: Any) -> Any:
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        # torch then takes no other unpickler; its own knows fewer objects but is as strict.
        return torch.load(path, map_location=map_location, weights_only=True)
    # Strings of Python 2 may hold raw bytes of numpy arrays; latin1 keeps them as they are.
    return torch.load(
        path, map_location=map_location, weights_only=False, pickle_module=_PICKLE_MODULE, encoding="latin1"
    )


def _printable(error: Exception) -> str:
    """First line of a message that may quote the file, without control characters."""
    line = (str(error).strip().split("\n") or [""])[0][:200]
    return "".join(c if c.isprintable() else "?" for c in line) or type(error).__name__


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the checkpoint file in it.")
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); was it fully written or downloaded?")


def _check_zip(path: Path) -> None:
    """Truncated archives and TorchScript programs (which torch.load would run) end here."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.rpartition("/")[2] for n in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or damaged: its zip directory cannot be read ({error}).") from error
    if "constants.pkl" in names:
        raise ValueError(f"{path} is a TorchScript program, not a checkpoint; save its state_dict() instead.")
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive, but not one written by torch.save.")


def _load_safetensors(path: Path, map_location: Any) -> dict:
    try:
        from safetensors.torch import load_file as load_safetensors
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors: pip install safetensors.") from error
    try:
        device = str(map_location) if isinstance(map_location, (str, torch.device)) else "cpu"
        return load_safetensors(str(path), device=device)
    except Exception as error:
        raise ValueError(f"{path} is truncated or damaged ({str(error).strip()[:200]}).") from error
