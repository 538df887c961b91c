"""torch.export and torch.compile as docs/export.md tells: the operators of mmvssm_kernels stay whole in the graph."""

import io
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch._dynamo
from torch.export import Dim

from tests.export.test_onnx import FAMILIES, random_backbone

# At this size no window, patch or pair of pixels fits, so that padding is traced everywhere. Nothing is computed at it.
UNEVEN = (1061, 1487)
OPERATORS = {
    "vmamba": {"selective_scan_2d": 2, "add_norm": 11},
    "vim": {"bidirectional_selective_scan": 1, "add_norm": 2},
    "mambavision": {"selective_scan": 2, "causal_conv1d": 2, "add_norm": 10},
    "vig": {"bidirectional_gla": 1, "locality_gate": 1, "swiglu": 1, "add_norm": 5},
    "vigh": {"bidirectional_gla": 1, "locality_gate": 1, "swiglu": 1, "add_norm": 5},
}

ALONE = """
import sys, torch, mmvssm_kernels
run = torch.export.load("net.pt2").module()
expected = torch.load("expected.pt")
with torch.no_grad():
    for got, map in zip(run(expected["images"]), expected["maps"], strict=True):
        torch.testing.assert_close(got, map, rtol=1e-5, atol=1e-5)
assert not {"mmvssm", "mmengine", "mmpretrain"} & set(sys.modules)
"""


def operators(graph) -> Counter:
    """How often each operator of ours stands in a graph."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return Counter(target.split(".")[1] for target in targets if target.startswith("mmvssm."))


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def assert_equal(got, expected):
    got, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class TestPrograms:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_backbone_of_any_batch_and_size(self, name):
        net = random_backbone(name)
        dynamic = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        with torch.no_grad():
            program = torch.export.export(net, (torch.zeros(2, 3, *UNEVEN),), dynamic_shapes=(dynamic,), strict=False)
            loaded = saved_and_loaded(program)
            assert operators(loaded.graph) == OPERATORS[name]
            run = loaded.module(check_guards=False)
            for shape in ((2, 3, 64, 64), (3, 3, 75, 118)):
                images = torch.randn(shape)
                assert_equal(run(images), net(images))

    @pytest.mark.parametrize("name", ["vim-rope", "mambavision-fused"])
    def test_backbone_of_any_batch(self, name):
        net = random_backbone(name)
        with torch.no_grad():
            program = torch.export.export(
                net, (torch.zeros(2, 3, 48, 80),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
            )
            run = saved_and_loaded(program).module()
            for batch in (1, 3):
                images = torch.randn(batch, 3, 48, 80)
                assert_equal(run(images), net(images))

    def test_fixed_size_in_a_process_with_the_operators_only(self, tmp_path):
        net, images = random_backbone("vim"), torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            torch.export.save(torch.export.export(net, (images,), strict=False), tmp_path / "net.pt2")
            torch.save({"images": images, "maps": net(images)}, tmp_path / "expected.pt")
        subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True, timeout=300)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_classifier(self, family):
        """mmpretrain's classifier as it is: its mode 'tensor' is what runs without one."""
        classifier = build_classifier(random_backbone(family))
        with torch.no_grad():
            program = torch.export.export(
                classifier, (torch.zeros(2, 3, 48, 80),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
            )
            images = torch.randn(3, 3, 48, 80)
            logits = saved_and_loaded(program).module()(images)
            assert logits.shape == (3, 7)
            assert_equal(logits, classifier(images, mode="tensor"))


def build_classifier(backbone):
    """A classifier around the last map of a backbone."""
    pytest.importorskip("mmpretrain", reason="classifiers are those of mmpretrain, which is not installed")
    from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead

    head = LinearClsHead(num_classes=7, in_channels=backbone.out_channels[-1])
    return ImageClassifier(backbone, neck=GlobalAveragePooling(), head=head).eval()


class TestCompile:
    @pytest.fixture(autouse=True)
    def _reset(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def seen(graphs):
        """A backend that notes the graphs and runs them."""

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return backend

    @pytest.mark.parametrize("name", FAMILIES)
    def test_whole_network_is_one_graph(self, name):
        net, graphs = random_backbone(name), []
        compiled = torch.compile(net, fullgraph=True, backend=self.seen(graphs))
        images = torch.randn(2, 3, 48, 80)
        with torch.no_grad():
            assert_equal(compiled(images), net(images))
        assert len(graphs) == 1

    def test_changing_sizes_are_one_graph(self):
        """Scans, norms and gates with sizes that vary, of the family that dynamo is done with soonest."""
        net, graphs = random_backbone("vigh"), []
        compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=self.seen(graphs))
        with torch.no_grad():
            for shape in ((2, 3, 48, 80), (2, 3, 75, 118), (3, 3, 96, 64)):
                images = torch.randn(shape)
                assert_equal(compiled(images), net(images))
        assert len(graphs) == 1

    def test_training_step(self):
        """Forward and backward traced ahead of time, compared with eager gradients."""
        net = random_backbone("vigh").train()
        images = torch.randn(2, 3, 48, 80)
        gradients = []
        for forward in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
            net.zero_grad()
            torch.manual_seed(0)
            sum(y.square().mean() for y in forward(images)).backward()
            gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        assert_equal(gradients[1], gradients[0])
