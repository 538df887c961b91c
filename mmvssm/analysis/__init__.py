"""Size and cost of models."""

from mmvssm.analysis.flops import CONVENTIONS, FlopCount, count_flops, count_parameters
from mmvssm.analysis.models import ModelCost, model_cost

__all__ = ["CONVENTIONS", "FlopCount", "ModelCost", "count_flops", "count_parameters", "model_cost"]
