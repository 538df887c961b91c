"""What the base class does for any family, on a small backbone with batch norm."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from mmvssm.models import BaseBackbone


class Plain(BaseBackbone):
    """Two convolutions with batch norm, as a family would be written."""

    arch_zoo: ClassVar = {"small": dict(width=4)}
    arch_keys: ClassVar = dict(width=8)

    def __init__(self, arch="small", out_indices=(0, 1), frozen_stages=-1, norm_eval=False, **unknown):
        self.reject_unknown(unknown)
        super().__init__(frozen_stages=frozen_stages, norm_eval=norm_eval)
        width = self.resolve_arch(arch)["width"]
        self.depths = (1, 1)
        self.patch_embed = nn.Conv2d(3, width, 2, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)) for _ in range(2)
        )
        self.set_outputs(out_indices, (width, width), (2, 2))
        for i in self.out_indices:
            self.add_module(f"norm{i}", nn.Identity())
        self.freeze()


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


def test_norm_eval_keeps_batch_statistics():
    assert all(m.training for m in batch_norms(Plain().train()))
    net = Plain(norm_eval=True).train()
    assert net.training
    assert not any(m.training for m in batch_norms(net))
    assert all(p.requires_grad for m in batch_norms(net) for p in m.parameters())


def test_frozen_stage_keeps_its_statistics():
    net = Plain(frozen_stages=1).train()
    assert [m.training for m in batch_norms(net)] == [False, True]
    assert not net.patch_embed.weight.requires_grad


def test_defaults_of_arch_keys():
    assert Plain.resolve_arch({}) == {"width": 8}
    assert Plain.resolve_arch("small") == {"width": 4}
    described = Plain.resolve_arch("small")
    described["width"] = 100
    assert Plain.arch_zoo["small"]["width"] == 4


def test_unknown_argument_lists_the_known_ones():
    with pytest.raises(TypeError, match="Plain has no argument 'depth'; known arguments: arch, out_indices, frozen"):
        Plain(depth=3)


def test_negative_out_indices():
    net = Plain(out_indices=-1)
    assert (net.out_indices, net.out_channels, net.out_strides) == ((1,), (4,), (2,))


def test_no_weight_decay_asks_the_modules():
    net = Plain()
    assert net.no_weight_decay() == set()
    net.stages[1][1].no_weight_decay_params = ("weight",)
    assert net.no_weight_decay() == {"stages.1.1.weight"}


def test_last_stage_without_output_is_not_trained():
    net = Plain(out_indices=(0,))
    assert {k for k, p in net.named_parameters() if not p.requires_grad} == {
        k for k, _ in net.named_parameters() if k.startswith("stages.1")
    }
    assert isinstance(net.train(), Plain)
    assert not any(p.requires_grad for p in net.stages[1].parameters())
    assert torch.is_tensor(net.patch_embed.weight)
