"""Functions for users: the model zoo."""

from mmvssm.apis.zoo import config_path, get_backbone, get_model, list_models, model_info

__all__ = ["config_path", "get_backbone", "get_model", "list_models", "model_info"]
