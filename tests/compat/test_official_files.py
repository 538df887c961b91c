"""MMEngine's own loading with files of the authors."""

import pytest
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from mmvssm.checkpoints import convert_official
from mmvssm.checkpoints.loading import under_our_names
from mmvssm.models import VMamba
from tests.checkpoints.official_files import CLASSES, GENERATIONS, vmamba_file
from tests.compat.fresh_python import run_python


class Classifier(BaseModel):
    def __init__(self, arch="v2", num_classes=CLASSES):
        super().__init__()
        self.backbone = VMamba(GENERATIONS[arch], out_indices=(3,))
        self.head = nn.Module()
        self.head.fc = nn.Linear(64, num_classes)

    def forward(self, inputs):
        return self.head.fc(self.backbone(inputs)[-1].mean((2, 3)))


def holds(model, tensors) -> bool:
    own, theirs = model.state_dict(), convert_official(tensors)
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def shifted(tensors) -> dict:
    return {name: tensor + 1 for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", ["current", "single-file"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_load_checkpoint(tmp_path, layout, wrapper):
    tensors = vmamba_file("v2", layout)
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / "official.pth")
    model = Classifier()
    load_checkpoint(model, str(tmp_path / "official.pth"), map_location="cpu")
    assert holds(model, tensors)


def test_averaged_weights_are_taken_for_backbone_and_head(tmp_path):
    raw = vmamba_file("v2", "current")
    torch.save({"model": raw, "model_ema": shifted(raw), "optimizer": {}, "epoch": 3}, tmp_path / "training.pth")
    model = Classifier()
    load_checkpoint(model, str(tmp_path / "training.pth"), map_location="cpu")
    assert holds(model, shifted(raw))


def test_heads_follow_the_rule_of_mmengine(capsys):
    """A head for other classes stays as it is, after a warning; the backbone is loaded."""
    model = Classifier(num_classes=CLASSES + 1)
    before = model.head.fc.weight.clone()
    load_state_dict(model, vmamba_file("v2", "current"))
    assert torch.equal(model.head.fc.weight, before)
    assert "size mismatch for head.fc.weight" in capsys.readouterr().out
    tensors = convert_official(vmamba_file("v2", "current"))
    assert torch.equal(model.backbone.patch_embed.conv1.weight, tensors["backbone.patch_embed.conv1.weight"])


@pytest.mark.parametrize("tensors", [vmamba_file("v0", "legacy"), vmamba_file("v0", "current")], ids=["legacy", "v0"])
def test_another_variant_is_an_error(tensors):
    with pytest.raises(ValueError, match="does not fit this VMamba: it holds a VMamba"):
        load_state_dict(Classifier(), tensors)


def test_another_family_is_an_error():
    from tests.checkpoints.test_vim_files import official_file

    with pytest.raises(ValueError, match="does not fit a VMamba: These tensors are of a Vim"):
        load_state_dict(Classifier(), official_file())


def test_a_backbone_and_a_wrapped_model():
    tensors = vmamba_file("v2", "current")
    backbone = VMamba(GENERATIONS["v2"], out_indices=(3,))
    load_state_dict(backbone, tensors)
    assert torch.equal(backbone.norm3.weight, tensors["classifier.norm.weight"])
    wrapped = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = Classifier()
    assert under_our_names(wrapped, tensors).keys() == wrapped.module.state_dict().keys()


def test_what_is_not_of_the_authors_is_left_alone():
    """Checkpoints of runs, which may lack or exceed what a model has, and models without a backbone of ours."""
    own = Classifier().state_dict()
    partial = {"backbone.stages.0.blocks.0.mlp.fc1.bias": torch.zeros(1)}
    for state_dict in (own, partial, {}, {"epoch": 3}):
        assert under_our_names(Classifier(), state_dict) is state_dict
    foreign = vmamba_file("v2", "current")
    assert under_our_names(nn.Linear(2, 2), foreign) is foreign


def test_libraries_that_were_imported_before():
    """Inferencers hold the loading function from before `import mmvssm`, and convert even so."""
    run_python(
        "from mmengine.infer.infer import _load_checkpoint_to_model\n"
        "import mmvssm, torch\n"
        "from mmvssm.models import VMamba\n"
        "from mmvssm.checkpoints.families import get_family\n"
        "backbone = VMamba(dict(embed_dims=8, depths=(1, 1, 1, 1)))\n"
        "family, own = get_family('vmamba'), dict(backbone.named_parameters())\n"
        "theirs = {family.official_name(n, own): p.detach() + 1 for n, p in own.items()}\n"
        "assert 'layers.0.blocks.0.op.A_logs' in theirs\n"
        "_load_checkpoint_to_model(backbone, {'state_dict': theirs})\n"
        "assert all(torch.equal(p, theirs[family.official_name(n, own)]) for n, p in backbone.named_parameters())\n"
    )
