"""Key-mapping tables of the model families, and which family a state dict belongs to.

A family adds one file with a `Family` subclass and its name to `_FILES`; nothing else changes.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection

import torch

StateDict = dict[str, torch.Tensor]

# family name -> module of this package that holds its table
_FILES = {"mambavision": "mambavision", "vmamba": "vmamba", "vig": "vig", "vim": "vim"}


class Family(ABC):
    """How the published files of one family of backbones map to our names.

    The state dicts that come in are flat, without `backbone.` or other prefixes; what goes out are names of our
    backbone, plus names under `head.` (classifier) and `neck.` (feature pyramids that belong to the family).
    """

    name: str
    title: str
    prefer_ema: bool | None = True
    """Which weights the authors' numbers stand for where a file has several, as in `wrappers.unwrap`."""

    @abstractmethod
    def is_official(self, names: set[str]) -> bool:
        """Whether `names` are those of one of the authors' layouts."""

    @abstractmethod
    def is_ours(self, names: set[str]) -> bool:
        """Whether `names` are those of our backbone."""

    @abstractmethod
    def convert(self, state_dict: StateDict) -> tuple[StateDict, list[str]]:
        """The authors' tensors under our names (`stages.*`, ..., `head.*`), and the names that have no place."""

    @abstractmethod
    def describe(self, backbone: StateDict) -> tuple[str | None, str]:
        """Name of the arch whose tensors these are (our names; None if it is none of ours), and a sentence part."""

    def convert_outside(self, name: str) -> str | None:
        """Our name of a tensor that lies beside the backbone in the authors' files (a pyramid: `neck.*`), or None."""
        return None

    def official_name(self, name: str, names: Collection[str]) -> str:
        """What the authors' current code calls the parameter `name` of our backbone, whose parameters are `names`.

        Their weight-decay rules go by names, so reproducing those needs theirs.
        """
        return name

    def how_to_build(self, arch: str, backbone: StateDict) -> str:
        """Arguments of the model that takes `backbone` (our names), for the sentence about a file that does not fit."""
        return f"arch={arch!r}"

    def is_output_norm(self, name: str) -> bool:
        """Whether `name` (of our backbone) belongs to a norm after an output stage."""
        return False

    def resize(self, name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        """`tensor` brought to `shape` where the size depends on the image, or None where it does not."""
        return None


def known_families() -> list[str]:
    """Names of the families that can be converted."""
    return sorted(_FILES)


def get_family(name: str) -> Family:
    """The table of family `name`.

    Raises:
        ValueError: Unknown family.
    """
    if name not in _FILES:
        raise ValueError(f"family must be one of {known_families()} or None, got {name!r}.")
    return importlib.import_module(f"mmvssm.checkpoints.{_FILES[name]}").FAMILY


def detect_family(names: set[str]) -> Family | None:
    """The family whose layout (the authors' or ours) `names` follow, or None."""
    for name in known_families():
        family = get_family(name)
        if family.is_official(names) or family.is_ours(names):
            return family
    return None
