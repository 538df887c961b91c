"""Size, cost, speed and receptive fields of models."""

from mmvssm.analysis.flops import CONVENTIONS, FlopCount, count_flops, count_parameters
from mmvssm.analysis.models import ModelCost, model_cost
from mmvssm.analysis.receptive_field import ReceptiveField, effective_receptive_field
from mmvssm.analysis.speed import Speed, measure_speed

__all__ = [
    "CONVENTIONS",
    "FlopCount",
    "ModelCost",
    "ReceptiveField",
    "Speed",
    "count_flops",
    "count_parameters",
    "effective_receptive_field",
    "measure_speed",
    "model_cost",
]
