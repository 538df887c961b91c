"""Optimisation: parameter groups."""

from mmvssm.engine.layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ["LayerDecayOptimWrapperConstructor"]
