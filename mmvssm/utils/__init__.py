"""Utilities that belong to no model."""

from mmvssm.utils.environment import collect_environment, environment_report, find_problems

__all__ = ["collect_environment", "environment_report", "find_problems"]
