"""Configs that inherit ours by ``mmvssm::`` from anywhere."""

import pytest

pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

BASE = "vmamba/vmamba-tiny-s1l8_tinyimagenet20.py"


def scopes(value):
    """Every ``_scope_`` in a config."""
    if isinstance(value, dict):
        return {scope for part in value.values() for scope in scopes(part)} | {value.get("_scope_")}
    return {scope for part in value for scope in scopes(part)} if isinstance(value, (list, tuple)) else set()


def test_types_are_those_of_the_library(tmp_path):
    pytest.importorskip("mmpretrain", reason="needs mmpretrain")
    import mmpretrain.datasets  # noqa: F401  fills the registry

    (tmp_path / "config.py").write_text(f'_base_ = "mmvssm::{BASE}"\nval_dataloader = dict(dataset=dict(indices=1))\n')
    cfg = Config.fromfile(tmp_path / "config.py")
    assert cfg.default_scope == "mmpretrain"
    assert "mmvssm" not in scopes(cfg._cfg_dict)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        assert DATASETS.build(dict(cfg.val_dataloader.dataset, lazy_init=True)) is not None


def test_bases_of_others_keep_their_scope(tmp_path):
    pytest.importorskip("mmpretrain", reason="needs mmpretrain")
    (tmp_path / "config.py").write_text(
        '_base_ = "mmpretrain::_base_/datasets/imagenet_bs32.py"\nx = _base_.dataset_type\n'
    )
    path, scope = Config._get_cfg_path("mmpretrain::_base_/datasets/imagenet_bs32.py", str(tmp_path / "config.py"))
    assert scope == "mmpretrain"
    assert path.endswith("imagenet_bs32.py")
