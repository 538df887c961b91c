"""Checkpoints: safe opening, the authors' layouts, loading with a coverage report."""

from mmvssm.checkpoints.convert import convert_official
from mmvssm.checkpoints.families import known_families
from mmvssm.checkpoints.loading import LoadReport, load_into
from mmvssm.checkpoints.reader import load_file, read_checkpoint
from mmvssm.checkpoints.wrappers import unwrap

__all__ = [
    "LoadReport",
    "convert_official",
    "known_families",
    "load_file",
    "load_into",
    "read_checkpoint",
    "unwrap",
]
