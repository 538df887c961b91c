"""The folder of exported features: a file per image, a manifest, and what keeps them consistent."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from mmvssm.apis.feature_files import SUFFIXES, Stage, require_package, write_features

MANIFEST = "manifest.jsonl"
SETTINGS = "settings.json"
FAILURES = "failures.jsonl"
_LOCK = ".lock"
_UNFINISHED = ".unfinished"  # the only temporary name, since a folder has one writer
_open_folders: set[Path] = set()  # locks of the operating system do not keep out the process that holds them


def read_manifest(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The records of a folder of features, one per finished image; `record['file']` is relative to the folder.

    Raises:
        FileNotFoundError: The folder holds no features.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no features: {MANIFEST} is not there.")
    return _records(path)


class FeatureStore:
    """The folder of an export while it is written: locked, with settings that cannot change, resumable.

    Every file is written under a temporary name and renamed, and only then entered in the manifest. So whatever kills
    the process, a file with its final name is whole; one that is not yet in the manifest is written again.

    Args:
        folder: Made if need be. A folder that already holds something other than an export is refused.
        settings: All that the contents depend on, as JSON types.
        format: 'npz', 'safetensors' or 'hdf5'.
        origins: Name -> absolute path of the images that the run is about. Features of an image of the same name from
            elsewhere are not taken for those of this one.

    Attributes:
        done: Name -> original size of every finished image. Nothing else of them stays in memory.

    Raises:
        ValueError: Another run writes into the folder, it holds features of other settings or of other images of the
            same name, or other files.
        OSError: The file system has no locks.
        ImportError: The package for the format is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        format: str,
        origins: Mapping[str, str] | None = None,
    ):
        self.folder = Path(folder)
        self.format = format
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[str, tuple[int, int]] = {}
        self._origins = origins or {}
        require_package(format)

    def __enter__(self) -> "FeatureStore":
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out={str(self.folder)!r} is a file; give a folder.")
        self._refuse_foreign()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if getattr(self, "_manifest", None) is not None:
            self._manifest.close()
        (self.folder / _UNFINISHED).unlink(missing_ok=True)
        _open_folders.discard(self.folder.resolve())
        self._lock_file.close()  # lets go of the lock; the file itself stays, or a third run could lock a new one

    def file_of(self, image: str) -> str:
        """Name of the feature file of an image, relative to the folder."""
        return f"features/{image}{SUFFIXES[self.format]}"

    def write(self, record: dict[str, Any], tensors: Mapping[Stage, torch.Tensor]) -> None:
        """Write the features of one image (on the CPU) and enter it in the manifest."""
        self.replace(record["file"], lambda file: write_features(file, self.format, record, tensors))
        self._manifest.write((json.dumps(record) + "\n").encode())
        self._manifest.flush()
        self.done[record["image"]] = tuple(record["original_size"])

    def replace(self, name: str, write: Any) -> None:
        """Let `write(binary file)` make the file `name` of the folder, all or nothing."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / _UNFINISHED
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, target)

    def _refuse_foreign(self) -> None:
        if self.folder.exists() and not (self.folder / SETTINGS).exists():
            others = sorted(p.name for p in self.folder.iterdir() if p.name not in (_LOCK, _UNFINISHED))
            if others and not (self.folder / SETTINGS).exists():  # another run may have made it just now
                raise ValueError(
                    f"out={str(self.folder)!r} holds other files ({others[0]}, ...) and no {SETTINGS}; "
                    "give a new or empty folder."
                )

    def _lock(self) -> None:
        busy = f"Another run is writing into {self.folder}; wait for it, or give another folder."
        if self.folder.resolve() in _open_folders:
            raise ValueError(busy)
        self._lock_file = (self.folder / _LOCK).open("a+b")
        try:
            _take(self._lock_file)
        except OSError as error:
            self._lock_file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise ValueError(busy) from error
            raise OSError(f"{self.folder} cannot be locked ({error.strerror}); give one on another disk.") from error
        _open_folders.add(self.folder.resolve())

    def _open(self) -> None:
        self._manifest: BinaryIO | None = None
        path = self.folder / SETTINGS
        if path.exists():
            self._compare_settings(json.loads(path.read_text(encoding="utf-8")))
        else:
            text = json.dumps(self.settings, indent=2) + "\n"
            self.replace(SETTINGS, lambda file: file.write(text.encode()))
        manifest = self.folder / MANIFEST
        manifest.touch()
        _cut_torn_line(manifest)
        for record in _records(manifest):
            origin = self._origins.get(record["image"], record["path"])
            if origin != record["path"]:
                raise ValueError(
                    f"{self.folder} holds features of {record['path']} under the name {record['image']}, which would "
                    f"now be {origin}. Give another folder."
                )
            # A feature file that was removed is made again; its line then stands twice, with the same contents.
            if _has_contents(self.folder / record["file"]):
                self.done[record["image"]] = tuple(record["original_size"])
        self._origins = {}  # not needed any more, and there may be a million
        self._manifest = manifest.open("ab")

    def _compare_settings(self, there: dict[str, Any]) -> None:
        differing = [k for k in {**there, **self.settings} if there.get(k) != self.settings.get(k)]
        if differing:
            details = "; ".join(f"{k} is {there.get(k)!r} there, {self.settings.get(k)!r} now" for k in differing)
            raise ValueError(f"{self.folder} holds features of other settings ({details}). Give another folder.")


def _has_contents(path: Path) -> bool:
    """Whether there is a file with something in it; after a power failure some file systems leave empty ones."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only: the last one may be in the making."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                record = json.loads(line)
                if record["image"] not in seen:
                    seen.add(record["image"])
                    yield record


def _cut_torn_line(path: Path) -> None:
    """Remove what a killed run left of its last line."""
    with path.open("r+b") as file:
        whole = 0
        for line in file:
            if line.endswith(b"\n"):
                whole += len(line)
        file.truncate(whole)


def _take(file: BinaryIO) -> None:
    """Lock a file without waiting; the system lets go of it when the process ends, however it ends.

    Raises:
        OSError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        # Not flock: forked loading workers would share that lock and outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
