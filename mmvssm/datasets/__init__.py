"""Data sets. Those for MMDetection need the extra ``openmmlab``; :func:`write_shapes` does not need mmdet."""

from importlib.util import find_spec

from .shapes import write_shapes

__all__ = ["write_shapes"]

if find_spec("mmdet") is not None:
    from .generated_shapes import GeneratedShapes

    __all__ += ["GeneratedShapes"]
