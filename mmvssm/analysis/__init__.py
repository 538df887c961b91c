"""Size, cost and speed of models."""

from mmvssm.analysis.flops import CONVENTIONS, FlopCount, count_flops, count_parameters
from mmvssm.analysis.models import ModelCost, model_cost
from mmvssm.analysis.speed import Speed, measure_speed

__all__ = [
    "CONVENTIONS",
    "FlopCount",
    "ModelCost",
    "Speed",
    "count_flops",
    "count_parameters",
    "measure_speed",
    "model_cost",
]
