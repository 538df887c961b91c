"""Models by name: the zoo, timm (a stand-in, since it is optional), variants."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from mmvssm.analysis.contenders import build_backbone, build_classifier, parse_contender


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.fused_attn = True


class Transformer(nn.Module):
    """A classifier as timm builds it, for one image size."""

    def __init__(self, img_size):
        super().__init__()
        self.img_size = img_size
        self.attention = Attention()
        self.layer = nn.Conv2d(3, 4, 8, 8)

    def forward_intermediates(self, x, indices, intermediates_only):
        return [self.layer(x)]


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 8, 8)


@pytest.fixture
def timm(monkeypatch):
    models = {"deit": Transformer, "resnet": ConvNet}
    module = ModuleType("timm")
    module.is_model = models.__contains__
    module.list_models = lambda pattern: [name for name in models if pattern.strip("*") in name]
    module.create_model = lambda name, **arguments: models[name](**arguments)
    monkeypatch.setitem(sys.modules, "timm", module)


def test_names(timm):
    assert parse_contender("vim-tiny") == ("vim-tiny", False, ())
    assert parse_contender("timm:deit@plain") == ("deit", True, ("plain",))
    assert parse_contender("mambavision-t@folded") == ("mambavision-t", False, ("folded",))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vim-tinny", "no model named 'vim-tinny'; did you mean vim-tiny"),
        ("timm:dei", "timm has no model 'dei'; did you mean deit?"),
        ("vim-tiny@fast", "the variant 'fast'; known: plain, folded"),
        ("vim-tiny@plain", "'plain' is for timm only"),
        ("timm:deit@folded", "'folded' is for the zoo only"),
    ],
)
def test_bad_names(timm, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_contender(name)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm:deit needs timm, which is not installed"):
        parse_contender("timm:deit")


def test_timm_models_are_built_for_the_size_where_they_have_one(timm):
    model = build_classifier("timm:deit", (32, 64))
    assert model.img_size == (32, 64)
    assert model.attention.fused_attn
    assert not model.training
    assert not build_classifier("timm:deit@plain", (32, 64)).attention.fused_attn
    assert isinstance(build_classifier("timm:resnet", (32, 64)), ConvNet)
    with pytest.raises(ValueError, match="no attention that could be plain"):
        build_classifier("timm:resnet@plain", (32, 64))


def test_models_of_the_zoo_are_built_for_the_size():
    model = build_classifier("vim-tiny", (32, 48))
    assert model.backbone.pos_embed.shape[1] == 2 * 3 + 1
    assert not model.training
    with pytest.raises(ValueError, match="Vim has no batch norms to fold"):
        build_classifier("vim-tiny@folded", (32, 48))
    assert build_classifier("mambavision-t@folded", (32, 32)).backbone.fused


def test_backbones_give_one_map(timm, tmp_path):
    x = torch.zeros(1, 3, 32, 64)
    assert [tuple(m.shape) for m in build_backbone("vim-tiny", (32, 64))(x)] == [(1, 192, 2, 4)]
    trained = Transformer(None)
    torch.save(trained.state_dict(), tmp_path / "timm.pth")
    backbone = build_backbone("timm:deit", (32, 64), checkpoint=tmp_path / "timm.pth")
    torch.testing.assert_close(backbone(x), (trained.layer(x),))
    torch.save({"state_dict": {"other.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    for arguments, sentence in (
        (dict(checkpoint=tmp_path / "other.pth"), "does not fit timm:deit"),
        (dict(stage=1), "only the last stage"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build_backbone("timm:deit", (32, 64), **arguments)
    with pytest.raises(ValueError, match="leave them out"):
        build_backbone("timm:deit@plain", (32, 64))
