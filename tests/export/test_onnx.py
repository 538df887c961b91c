"""Exported files against the models in onnxruntime, and the operators' decompositions against the operators."""

import pytest
import torch
from torch import nn

from mmvssm.export import export_onnx, onnx_errors
from mmvssm.export import onnx as export_module
from mmvssm.export.decompositions import decomposition_table
from mmvssm.export.recurrence import recurrence
from mmvssm.models import MambaVision, ViG, ViGH, Vim, VMamba
from tests.helpers import ROOT
from tests.tools.conftest import load_tool

TOLERANCE = 1e-4
PART = 32  # tokens that a Scan takes one after the other
# Blocks of every kind, but few: torch's exporter takes seconds for each.
BACKBONES = {
    "vmamba": lambda: VMamba(dict(embed_dims=16, depths=(1, 1)), out_indices=(0, 1)),
    "vmamba-v0": lambda: VMamba(
        dict(embed_dims=16, depths=(1, 1), d_state=4, gated=True, mlp_ratio=0.0, stem="patch", downsample="merge"),
        out_indices=(0, 1),
    ),
    "vim": lambda: Vim(dict(embed_dims=16, depth=1, d_state=4), img_size=64, out_indices=(0,)),
    "vim-rope": lambda: Vim(
        dict(embed_dims=16, depth=1, d_state=4), img_size=64, out_type="cls_token", rope=True, directions="shared"
    ),
    "mambavision": lambda: MambaVision(
        dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(2, 4), window_size=(4, 2), layer_scale=0.5)
    ),
    "mambavision-fused": lambda: (
        MambaVision(dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(2, 4)), window_size="map", out_indices=(3,))
        .eval()
        .fuse_batch_norms()
    ),
    "vig": lambda: ViG(dict(embed_dims=64, depth=1), img_size=64, out_indices=(0,)),
    "vigh": lambda: ViGH(dict(embed_dims=32, depths=(1,)), out_indices=(0,)),
}
FAMILIES = ("vmamba", "vim", "mambavision", "vig", "vigh")


@pytest.fixture
def runtime():
    """Skips what needs the packages of the extra ``onnx``."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package}, of the extra onnx, is not installed")


def random_backbone(name: str) -> nn.Module:
    """Parameters that all matter: the zeros and ones of an initialisation would hide mistakes."""
    torch.manual_seed(0)
    net = BACKBONES[name]().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


class TestFiles:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_any_size(self, name, tmp_path, runtime):
        """Above and below one window, and a grid that fits patches, windows and parts and one that does not."""
        net = random_backbone(name)
        path = export_onnx(net, tmp_path / "net.onnx", 64, dynamic="all", verify=False)
        for size, batch in (((64, 64), 1), ((75, 118), 2), ((33, 130), 3), ((17, 20), 1)):
            errors = onnx_errors(path, net, size, batch)
            assert len(errors) == len(net.out_indices)
            assert max(errors.values()) <= TOLERANCE, (size, errors)

    @pytest.mark.parametrize("name", [name for name in BACKBONES if name not in FAMILIES])
    def test_any_batch(self, name, tmp_path, runtime):
        net = random_backbone(name)
        path = export_onnx(net, tmp_path / "net.onnx", (48, 80), verify=False)
        for batch in (1, 3):
            assert max(onnx_errors(path, net, (48, 80), batch).values()) <= TOLERANCE

    def test_classifier_in_standard_operators(self, tmp_path, runtime):
        import onnx
        from mmengine.registry import MODELS, DefaultScope

        pytest.importorskip("mmpretrain", reason="classifiers are those of mmpretrain, which is not installed")
        import mmpretrain.models  # noqa: F401  fills the registry

        with DefaultScope.overwrite_default_scope("mmpretrain"):
            model = MODELS.build(
                dict(
                    type="ImageClassifier",
                    backbone=dict(
                        type="mmvssm.VMamba", arch=dict(embed_dims=16, depths=(1,), stem="patch"), out_indices=(0,)
                    ),
                    neck=dict(type="GlobalAveragePooling"),
                    head=dict(type="LinearClsHead", num_classes=5, in_channels=16),
                )
            )
        model.train()
        path = export_onnx(model, tmp_path / "new" / "classifier.onnx", 40, dynamic="none")
        assert model.training
        file = onnx.load(path)
        assert [output.name for output in file.graph.output] == ["logits"]
        assert {node.domain for node in file.graph.node} == {""}
        # 100 tokens: ends of the parts, states between them, outputs of the parts.
        assert sum(node.op_type == "Scan" for node in file.graph.node) == 3
        assert not file.functions

    @pytest.mark.parametrize("rates", [True, False], ids=["by-state", "by-row"])
    def test_parts_give_the_whole(self, rates, tmp_path, runtime):
        """The recurrence alone, from a state that is not zero, at lengths around whole parts."""
        import onnxruntime

        from mmvssm.export.onnx_functions import TRANSLATIONS

        class Recurrence(nn.Module):
            def forward(self, q, k, v, g, rates, state):
                return recurrence(q, k, v, g, rates, state)

        def inputs(length):
            torch.manual_seed(length)
            g = -torch.rand(length, 2, 5 if rates else 4)
            q, k = torch.randn(2, length, 2, 4)
            return q, k, torch.randn(length, 2, 5), g, torch.rand(4, 5) if rates else None, torch.randn(2, 4, 5)

        dynamic = tuple({0: torch.export.Dim.DYNAMIC} if i < 4 else None for i in range(6))
        program = torch.onnx.export(
            Recurrence().eval(),
            inputs(70),
            dynamic_shapes=dynamic,
            dynamo=True,
            opset_version=18,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
        program.save(tmp_path / "recurrence.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "recurrence.onnx"), providers=["CPUExecutionProvider"])
        for length in (1, PART, PART + 1, 3 * PART, 1000):
            tensors = inputs(length)
            names = [value.name for value in session.get_inputs()]
            feed = dict(zip(names, [t.numpy() for t in tensors if t is not None], strict=True))
            got = torch.from_numpy(session.run(None, feed)[0])
            want = recurrence(*tensors)
            torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), rtol=0, atol=1e-6)

    def test_check_sees_other_weights(self, tmp_path, runtime):
        net = VMamba(dict(embed_dims=16, depths=(1,), stem="patch"), out_indices=(0,))
        path = export_onnx(net, tmp_path / "net.onnx", 16, dynamic="none")
        with torch.no_grad():
            net.stages[0].blocks[0].mixer.x_proj_weight.mul_(2)
        assert onnx_errors(path, net, 16)["stage0"] > TOLERANCE
        with pytest.raises(RuntimeError, match="differs from the model at 1 x 16 x 16: stage0"):
            export_module._verify(path, net, (16, 16), "none")


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "sentence"),
        [
            (dict(path="net.pt"), ValueError, "path must end in .onnx, got net.pt"),
            (dict(dynamic="size"), ValueError, "dynamic='size' must be one of 'none', 'batch', 'all'"),
            (dict(input_size=0), ValueError, "input_size=0 must be a positive integer or a pair"),
            (dict(input_size=(1, 2, 3)), ValueError, "input_size="),
            (dict(out_indices=(0,)), ValueError, "checkpoint and out_indices are for names"),
            (dict(model=3), TypeError, "model must be a name or a torch.nn.Module, got int"),
            (dict(model=nn.Linear(1, 1)), TypeError, "export_onnx takes classifiers and backbones .* got Linear"),
            (dict(model="vmamba-tinny"), ValueError, "There is no model named 'vmamba-tinny'"),
        ],
    )
    def test_mistakes(self, arguments, error, sentence, monkeypatch):
        monkeypatch.setattr(export_module, "_require", lambda *packages: None)
        net = VMamba(dict(embed_dims=16, depths=(1,)), out_indices=(0,))
        with pytest.raises(error, match=sentence):
            export_onnx(**{"model": net, "path": "net.onnx", **arguments})

    def test_models_that_a_file_cannot_hold(self, monkeypatch):
        monkeypatch.setattr(export_module, "_require", lambda *packages: None)
        net = VMamba(dict(embed_dims=16, depths=(1,)), out_indices=(0,)).half()
        with pytest.raises(ValueError, match=r"float32 models on the CPU, but .* is torch.float16"):
            export_onnx(net, "net.onnx")
        with pytest.raises(ValueError, match="flip_ratio"):
            export_onnx(Vim(dict(embed_dims=16, depth=1), flip_ratio=0.5), "net.onnx")
        net = VMamba(dict(embed_dims=16, depths=(1,)), out_indices=(0,))
        net.decode_head = nn.Identity()
        with pytest.raises(TypeError, match="its attribute backbone"):
            export_onnx(net, "net.onnx")

    def test_missing_packages(self, monkeypatch):
        monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ImportError, match=r"needs onnx, onnxscript, onnxruntime; .* pip install \"mmvssm\[onnx\]\""
        ):
            export_onnx(VMamba(dict(embed_dims=16, depths=(1,)), out_indices=(0,)), "net.onnx")


def test_tool(tmp_path, runtime, capsys, monkeypatch):
    net = VMamba(dict(embed_dims=16, depths=(1,), stem="patch"), out_indices=(0,))
    monkeypatch.setattr(export_module, "_named", lambda name, checkpoint, out_indices: net)
    tool = load_tool("export_onnx")
    assert tool.main(["some-name", str(tmp_path / "net.onnx"), "--size", "16", "24", "--dynamic", "none"]) == 0
    out = capsys.readouterr().out
    assert "images (1, 3, 16, 24)" in out
    assert "stage0 (1, 16, 4, 6)" in out
    assert tool.main(["some-name", str(tmp_path / "net.pt")]) == 2
    assert "path must end in .onnx" in capsys.readouterr().err


# ---------------------------------------------------------------------- pieces, which need no further package


def test_every_operator_has_a_decomposition():
    folders = {path.parent.name for path in (ROOT / "kernels" / "mmvssm_kernels").glob("*/op.py")}
    assert len(folders) >= 9
    assert {operator.name() for operator in decomposition_table()} == {f"mmvssm::{name}" for name in folders}


def _random(*shape):
    return torch.randn(*shape)


def operator_calls():
    """Operator name -> arguments without the backend."""
    u, weights = (2, 6, 70), (2, 3, 4, 70)
    scan = [_random(*u), _random(*u), -torch.rand(6, 4), _random(*weights), _random(*weights)]
    scan[3], scan[4] = scan[3][:, :2], scan[4][:, :2]
    parameters = [_random(6, 4), _random(6), _random(11, 6), _random(6, 3), _random(6), _random(6, 4), _random(6)]
    stream = [_random(2, 7, 6), _random(2, 7, 6)]
    heads = [_random(2, 70, 2, n) for n in (3, 3, 5, 3, 3)]
    return {
        "selective_scan-full": [*scan, _random(6), _random(*u), _random(6), True, False, False, torch.float32],
        "selective_scan-reversed": [
            *scan[:1],
            torch.rand(*u),
            *scan[2:],
            None,
            None,
            None,
            False,
            True,
            False,
            torch.float32,
        ],
        "selective_scan_2d": [
            *(_random(2, 6, 7, 11), _random(4, 11, 6), _random(4, 6, 3), _random(4, 6), _random(24, 4), _random(24)),
            torch.float32,
        ],
        "bidirectional_selective_scan-both": [
            _random(2, 70, 12),
            [*parameters, *(p + 0.1 for p in parameters)],
            0.5,
            False,
            torch.float32,
        ],
        "bidirectional_selective_scan-forward": [_random(2, 70, 12), parameters, 1.0, False, torch.float32],
        "bidirectional_gla-norm": [*heads, _random(5), 0.3, 16.0, 1e-6, torch.float32, False],
        "bidirectional_gla-plain": [
            *heads[:3],
            *(-g.abs() for g in heads[3:]),
            None,
            1.0,
            None,
            1e-6,
            torch.float32,
            False,
        ],
        "causal_conv1d-causal": [_random(*u), _random(6, 4), _random(6), "silu", True, "causal", torch.float32],
        "causal_conv1d-same": [_random(*u), _random(6, 3), None, None, False, "same", torch.float16],
        "add_norm-rms": [*stream, _random(6), None, 1e-5, "rms", _random(2), torch.float32, torch.float32],
        "add_norm-layer": [*stream, _random(6), _random(6), 1e-5, "layer", None, torch.float32, torch.float16],
        "add_norm-alone": [stream[0], None, _random(6), None, 1e-5, "layer", None, torch.float32, torch.float32],
        "swiglu": [_random(2, 7, 6)],
        "locality_gate": [*(_random(2, 7, 3, 4) for _ in range(3)), _random(4), _random(12), 1e-6, True],
        "bias_activation": [_random(2, 7, 6), _random(6), "gelu_tanh", _random(2, 7, 6)],
        "cast_together": [[_random(3, 5), _random(2048), _random(7)], torch.float16],
    }


@pytest.mark.parametrize("case", operator_calls())
def test_decompositions_compute_the_same(case):
    torch.manual_seed(0)
    arguments = [*operator_calls()[case], "torch"]
    operator = getattr(torch.ops.mmvssm, case.partition("-")[0]).default
    expected, got = operator(*arguments), decomposition_table()[operator](*arguments)
    if isinstance(expected, tuple):
        assert len(expected) == len(got)
        expected, got = expected[0], got[0]  # the others are for the backward pass
    if case.startswith("add_norm"):
        torch.testing.assert_close(
            decomposition_table()[operator](*arguments)[1], operator(*arguments)[1], rtol=1e-5, atol=1e-5
        )
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    scale = expected.abs().max()
    limit = 1e-5 if got.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=limit)
