"""Fetching checkpoints: once, whole, and the file that was meant."""

import hashlib
import http.client
import logging
import os
import re
import tempfile
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, urlparse

import torch

# The convention of torch.hub and the OpenMMLab libraries: names end with the first digits of the SHA-256. Numbers alone
# are taken for dates, which stand there too.
_HASH_IN_NAME = re.compile(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.")


def download(url: str, folder: str | os.PathLike | None = None, check_name: bool = False) -> str:
    """Fetch a checkpoint once through torch's downloader, with a progress bar, and return its path.

    What arrives is checked before it is kept: against the SHA-256 that the metafile of the zoo gives for this address
    or, with `check_name`, the beginning of one in the file name (`name-0123abcd.pth`); without either, that it is a
    whole checkpoint, with the checksums of its archive. A file in the cache whose SHA-256 is known is checked as well,
    and fetched again if it is another one.

    In distributed jobs rank 0 downloads while the others wait.

    Args:
        url: An http(s) address.
        folder: Of the cache; by default `checkpoints` in `torch.hub.get_dir()`, as in the OpenMMLab libraries. Files
            whose name says nothing about their content (`model.safetensors`) lie in a subfolder for their address.
        check_name: Whether a checksum in the name counts.

    Raises:
        ValueError: The download fails, is cut short, or is not what was meant. Nothing of it is kept.
    """
    from mmengine.dist import get_dist_info

    folder = Path(folder or os.path.join(torch.hub.get_dir(), "checkpoints"))
    target, sha256 = _target(url, folder), _expected(url, check_name)
    rank, world_size = get_dist_info()
    try:
        if rank == 0:
            _fetch(url, target, sha256)
    finally:
        if world_size > 1:
            torch.distributed.barrier()
    if rank != 0:  # also on other nodes, whose caches rank 0 does not see
        _fetch(url, target, sha256)
    return str(target)


def sha256_of_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).expanduser().open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _name(url: str) -> str:
    return unquote(Path(urlparse(url).path).name).replace("/", "_") or "checkpoint.pth"


def _target(url: str, folder: Path) -> Path:
    """Two addresses must not share a file of the cache, and many files are called alike."""
    from mmvssm.utils.model_index import is_published

    name = _name(url)
    if is_published(url) or _HASH_IN_NAME.search(name):
        return folder / name
    return folder / hashlib.sha256(url.encode()).hexdigest()[:8] / name


def _expected(url: str, check_name: bool) -> str | None:
    """The SHA-256, or its first digits, that the file at `url` has to have; None if nobody says."""
    from mmvssm.utils.model_index import sha256_of

    in_name = _HASH_IN_NAME.search(_name(url)) if check_name else None
    return sha256_of(url) or (in_name[1] if in_name else None)


def _fetch(url: str, target: Path, sha256: str | None) -> None:
    if target.exists():
        if sha256 is None or sha256_of_file(target).startswith(sha256):
            return
        from mmengine.logging import print_log

        print_log(f"{target} is not the file of {url}; it is fetched again.", "current", logging.WARNING)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under its own name, since the ending tells how to read it, in a folder that goes again whatever happens.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        arrived = Path(folder) / target.name
        try:
            torch.hub.download_url_to_file(url, str(arrived), progress=True)
        except (URLError, OSError, http.client.HTTPException) as error:
            raise ValueError(f"{url} could not be downloaded ({error}); fetch it by hand and give its path.") from error
        _check(url, arrived, sha256)
        os.replace(arrived, target)


def _check(url: str, arrived: Path, sha256: str | None) -> None:
    if sha256 is not None:
        found = sha256_of_file(arrived)
        if not found.startswith(sha256):
            begins = "" if len(sha256) == 64 else "one that begins with "
            raise ValueError(
                f"What {url} gave has the SHA-256 {found} instead of {begins}{sha256}: it was damaged on its way, or "
                "replaced by another file. It was not kept; try again, or fetch it by hand and give its path."
            )
        return
    from mmvssm.checkpoints.reader import check_whole

    try:
        check_whole(arrived)
    except ValueError as error:
        what = str(error).replace(str(arrived), "the file")
        raise ValueError(f"{url} was downloaded, but {what.rstrip('.')}. It was not kept; try again.") from error
