"""Parameter groups: what is decayed, at which rate, in which library."""

import logging

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from mmvssm.engine import LayerDecayOptimWrapperConstructor
from mmvssm.models.backbones import VMamba
from tests.checkpoints.official_files import GENERATIONS

LR, DECAY = 1e-3, 0.05
DEPTHS = 7  # the stem, five blocks, what follows


class Classifier(BaseModule):
    def __init__(self, generation="v2", **kwargs):
        super().__init__()
        self.backbone = VMamba(GENERATIONS[generation], out_indices=(3,), **kwargs)
        self.head = nn.Linear(64, 5)


class Detector(BaseModule):
    def __init__(self, generation="v2"):
        super().__init__()
        self.backbone = VMamba(GENERATIONS[generation])
        self.neck = nn.Sequential(nn.Conv2d(8, 4, 1), nn.GroupNorm(2, 4))
        self.rpn_head = nn.Conv2d(4, 2, 1)
        self.rpn_head.norm_scale = nn.Parameter(torch.ones(2, 2))


class Compiled(nn.Module):
    """What torch.compile puts around a module, without the seconds that importing the compiler takes."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)


def groups_of(model, paramwise_cfg=None, **optimizer):
    cfg = dict(optimizer={"type": "AdamW", "lr": LR, "weight_decay": DECAY, **optimizer})
    return LayerDecayOptimWrapperConstructor(cfg, paramwise_cfg)(model).optimizer.param_groups


def settings_of(model, paramwise_cfg=None, key="weight_decay", **optimizer):
    """Parameter name -> its setting."""
    groups = groups_of(model, paramwise_cfg, **optimizer)
    by_id = {id(p): group[key] for group in groups for p in group["params"]}
    assert sum(len(g["params"]) for g in groups) == len(by_id), "a parameter is in two groups"
    inner = getattr(model, "module", model)
    names = {n: id(p) for n, p in inner.named_parameters()}
    assert set(by_id) <= set(names.values())
    return {n: by_id[i] for n, i in names.items() if i in by_id}


def decayed(model, paramwise_cfg=None):
    return {n for n, decay in settings_of(model, paramwise_cfg).items() if decay > 0}


class TestDefault:
    @pytest.mark.parametrize("paramwise_cfg", [None, {}, {"preset": "default"}])
    def test_state_space_parameters_norms_and_biases_are_spared(self, paramwise_cfg):
        names = decayed(Classifier("v0"), paramwise_cfg)
        block = "backbone.stages.2.blocks.1"
        assert {n.removeprefix(f"{block}.mixer.") for n in names if n.startswith(block)} == {
            "in_proj.weight",
            "conv.weight",
            "x_proj_weight",
            "dt_proj_weight",
            "out_proj.weight",
        }
        assert {n for n in names if "stages" not in n} == {"backbone.patch_embed.projection.weight", "head.weight"}
        assert {n for n in names if "downsample" in n} == {
            f"backbone.stages.{i}.downsample.reduction.weight" for i in (1, 2, 3)
        }

    def test_all_parameters_are_in_a_group(self):
        model = Detector()
        assert settings_of(model).keys() == dict(model.named_parameters()).keys()

    def test_options(self):
        everything = decayed(Classifier(), dict(norm_decay_mult=1.0, bias_decay_mult=1.0, flat_decay_mult=1.0))
        spared = set(dict(Classifier().named_parameters())) - everything
        assert {n.rpartition(".")[2] for n in spared} == {"A_log", "D", "dt_proj_bias"}
        half = settings_of(Classifier(), dict(norm_decay_mult=0.5))
        assert half["backbone.norm3.weight"] == half["backbone.norm3.bias"] == DECAY / 2
        assert half["head.bias"] == 0

    def test_few_groups(self):
        assert len(groups_of(Detector())) == 2

    def test_frozen_parameters_are_left_out(self):
        names = settings_of(Classifier(frozen_stages=1))
        assert not [n for n in names if n.startswith(("backbone.patch_embed", "backbone.stages.0"))]
        assert "backbone.stages.1.blocks.0.mixer.A_log" in names

    def test_shared_parameters_are_entered_once(self):
        model = Classifier()
        model.head2 = nn.Linear(64, 5)
        model.head2.weight = model.head.weight
        settings_of(model, {"bypass_duplicate": True})  # asserts

    def test_stock_paramwise_cfg_of_the_parents(self):
        """A config may only change the constructor; what mmpretrain's Swin schedule holds has to be accepted."""
        stock = dict(
            norm_decay_mult=0.0,
            bias_decay_mult=0.0,
            flat_decay_mult=0.0,
            custom_keys={".absolute_pos_embed": dict(decay_mult=0.0)},
        )
        assert decayed(Classifier(), stock) == decayed(Classifier())


class TestOfficial:
    """What the authors' code decays, though some of it was not meant to be."""

    def test_classification(self):
        names = decayed(Classifier("v0"), {"preset": "official"})
        leaves = {n.rpartition(".")[2] for n in names if ".mixer." in n and ".weight" not in n}
        assert leaves == {"A_log", "dt_proj_bias", "dt_proj_weight", "x_proj_weight"}  # not D, which is 1-D
        assert "backbone.stages.0.blocks.0.mixer.conv.bias" not in names
        assert not [n for n in names if "norm" in n]

    def test_dense(self):
        spared = set(dict(Detector().named_parameters())) - decayed(Detector(), {"preset": "official"})
        block = {n for n in spared if n.startswith("backbone.stages.0.blocks.0.")}
        assert block == {
            f"backbone.stages.0.blocks.0.{norm}.{leaf}"
            for norm in ("norm1", "norm2", "mixer.out_norm")
            for leaf in ("weight", "bias")
        }
        # Their stem and downsampling norms are numbered, so that the rule misses them.
        assert not [n for n in spared if "patch_embed" in n or "downsample" in n]
        assert {n for n in spared if not n.startswith("backbone.stages")} == {
            *(f"backbone.norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")),
            "rpn_head.norm_scale",
        }

    def test_dense_with_patch_merging(self):
        """There the norm of the merging layer does have 'norm' in its name."""
        names = decayed(Detector("v0"), {"preset": "official-dense"})
        assert "backbone.stages.1.downsample.norm.weight" not in names
        assert "backbone.patch_embed.norm.weight" in names

    def test_choice_by_model(self):
        for model, preset in ((Classifier(), "official-classification"), (Detector(), "official-dense")):
            assert decayed(model, {"preset": "official"}) == decayed(model, {"preset": preset})


class TestLayerDecay:
    def test_rates(self):
        rates = settings_of(Detector(), dict(layer_decay_rate=0.5), key="lr")
        for name, depth in {
            "backbone.patch_embed.conv1.weight": 0,
            "backbone.stages.0.blocks.0.norm1.bias": 1,
            "backbone.stages.1.blocks.0.mixer.A_log": 2,
            "backbone.stages.2.blocks.1.mixer.in_proj.weight": 4,
            "backbone.stages.3.blocks.0.mlp.fc1.weight": 5,
            "backbone.norm0.weight": DEPTHS - 1,
            "neck.0.weight": DEPTHS - 1,
            "rpn_head.bias": DEPTHS - 1,
        }.items():
            assert rates[name] == pytest.approx(LR * 0.5 ** (DEPTHS - 1 - depth)), name

    def test_without_it_there_is_one_rate(self):
        assert set(settings_of(Detector(), key="lr").values()) == {LR}

    def test_backbone_alone(self):
        net = VMamba(GENERATIONS["v2"])
        assert settings_of(net, dict(layer_decay_rate=0.5), key="lr")["patch_embed.conv1.bias"] == LR * 0.5**6
        assert settings_of(net)["stages.0.blocks.0.mixer.A_log"] == 0

    def test_nested_detector(self):
        model = nn.Module()
        model.teacher = Detector()
        rates = settings_of(model, dict(layer_decay_rate=0.5), key="lr")
        assert rates["teacher.backbone.patch_embed.conv1.weight"] == LR * 0.5**6
        assert rates["teacher.neck.0.weight"] == LR

    def test_wrapped_model(self):
        model = Classifier()
        wrapped = nn.parallel.DataParallel(model)
        cfg = dict(layer_decay_rate=0.9)
        assert settings_of(wrapped, cfg, "lr") == settings_of(model, cfg, "lr")
        assert settings_of(wrapped) == settings_of(model)

    def test_compiled_parts(self):
        model = Classifier()
        expected = settings_of(model)
        model.backbone = Compiled(model.backbone)
        got = settings_of(model)
        assert {k.replace("_orig_mod.", ""): v for k, v in got.items()} == expected

    def test_foreign_backbone(self):
        model = nn.Module()
        model.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        assert decayed(model) == {"backbone.0.weight"}
        with pytest.raises(ValueError, match=r"layer_decay_rate=0.9 needs a backbone with get_layer_depth\(\); Seq"):
            groups_of(model, dict(layer_decay_rate=0.9))


class TestCustomKeys:
    def test_longest_match_decides(self):
        keys = {"stages": dict(decay_mult=0.0), "stages.3": dict(decay_mult=2.0, lr_mult=0.1)}
        decay = settings_of(Classifier(), dict(custom_keys=keys))
        assert decay["backbone.stages.0.blocks.0.mixer.in_proj.weight"] == 0
        assert decay["backbone.stages.3.blocks.0.mixer.in_proj.weight"] == 2 * DECAY
        rates = settings_of(Classifier(), dict(custom_keys=keys, layer_decay_rate=0.5), key="lr")
        assert rates["backbone.stages.3.blocks.0.mixer.in_proj.weight"] == pytest.approx(LR * 0.1 * 0.5)

    def test_a_rate_alone_leaves_the_decay_to_the_preset(self):
        keys = {"backbone": dict(lr_mult=0.1)}
        assert decayed(Classifier(), dict(custom_keys=keys)) == decayed(Classifier())

    def test_further_settings(self):
        groups = groups_of(Classifier(), dict(custom_keys={"head": dict(betas=(0.8, 0.9))}))
        assert {g["betas"] for g in groups} == {(0.9, 0.999), (0.8, 0.9)}


class TestErrors:
    @pytest.mark.parametrize(
        ("cfg", "error", "sentence"),
        [
            (
                {"decay_rate": 0.9},
                ValueError,
                r"has no 'decay_rate' with LayerDecay.*known are preset, layer_decay_rate",
            ),
            ({"preset": "swin"}, ValueError, "preset must be one of default, official.*got 'swin'"),
            ({"layer_decay_rate": 1.2}, ValueError, "layer_decay_rate must be a number above 0 and at most 1, got 1.2"),
            ({"layer_decay_rate": "0.9"}, ValueError, "layer_decay_rate must be a number"),
            ({"norm_decay_mult": None}, ValueError, "norm_decay_mult must be a number, got None"),
            ({"custom_keys": ["norm"]}, TypeError, "custom_keys must be a dict of dicts"),
            ({"preset": "official", "norm_decay_mult": 0.0}, ValueError, "norm_decay_mult cannot be given.*_delete_"),
            (["norm"], TypeError, "paramwise_cfg must be a dict or None, got list"),
        ],
    )
    def test_bad_configuration(self, cfg, error, sentence):
        with pytest.raises(error, match=sentence):
            groups_of(Classifier(), cfg)

    def test_no_learning_rate(self):
        with pytest.raises(ValueError, match="The optimizer has no lr"):
            LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type="AdamW")), dict(layer_decay_rate=0.5))


@pytest.mark.parametrize("scope", ["mmengine", "mmpretrain", "mmdet", "mmseg"])
def test_found_from_every_library(scope):
    cfg = dict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=LR, weight_decay=DECAY),
        constructor="mmvssm.LayerDecayOptimWrapperConstructor",
        paramwise_cfg=dict(layer_decay_rate=0.8),
    )
    with DefaultScope.overwrite_default_scope(scope):
        wrapper = build_optim_wrapper(Classifier(), cfg)
    assert len(wrapper.optimizer.param_groups) == 2 * DEPTHS


def test_the_groups_are_logged_as_a_table():
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance("groups", log_level="INFO")
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    model = Classifier()
    groups_of(model)
    table = next(line for line in lines if line.startswith("Parameter groups, preset 'default':\n"))
    head, *rows = table.split("\n")[1:]
    assert head.split() == ["group", "lr", "weight", "decay", "tensors", "parameters", "for", "example"]
    assert rows[0].split()[:3] == ["0", "0.001", "0.05"]
    assert sum(int(row.split()[4].replace(",", "")) for row in rows) == sum(p.numel() for p in model.parameters())
