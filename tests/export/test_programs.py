"""torch.export and torch.compile as docs/export.md tells: the operators of mmvssm_kernels stay whole in the graph."""

import io
from collections import Counter

import pytest
import torch
import torch._dynamo
from torch.export import Dim

from tests.export.test_onnx import BACKBONES, FAMILIES, random_backbone

# At this size no window, patch or pair of pixels fits, so that padding is traced everywhere. Nothing is computed at it.
UNEVEN = (1061, 1487)
OPERATORS = {
    "vmamba": {"selective_scan_2d": 2},
    "vim": {"bidirectional_selective_scan": 1, "add_norm": 2},
    "mambavision": {"selective_scan": 2, "causal_conv1d": 2, "add_norm": 6},
    "vig": {"bidirectional_gla": 1, "locality_gate": 1, "swiglu": 1, "add_norm": 3},
    "vigh": {"bidirectional_gla": 1, "locality_gate": 1, "swiglu": 1, "add_norm": 3},
}


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
    @pytest.mark.parametrize("name", BACKBONES)
    def test_any_batch(self, name):
        net = random_backbone(name)
        with torch.no_grad():
            program = torch.export.export(
                net, (torch.zeros(2, 3, 48, 80),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
            )
            loaded = saved_and_loaded(program)
            if name in OPERATORS:
                assert operators(loaded.graph) == OPERATORS[name]
            images = torch.randn(3, 3, 48, 80)
            assert_equal(loaded.module()(images), net(images))

    @pytest.mark.parametrize("name", [*FAMILIES, "vmamba-v0"])
    def test_any_size(self, name):
        net = random_backbone(name)
        dynamic = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        with torch.no_grad():
            program = torch.export.export(net, (torch.zeros(2, 3, *UNEVEN),), dynamic_shapes=(dynamic,), strict=False)
            run = saved_and_loaded(program).module(check_guards=False)
            for shape in ((2, 3, 64, 64), (3, 3, 75, 118)):
                images = torch.randn(shape)
                assert_equal(run(images), net(images))

    def test_fixed_size_and_batch(self):
        net = random_backbone("vmamba")
        with torch.no_grad():
            program = torch.export.export(net, (torch.zeros(1, 3, 32, 32),), strict=False)
            images = torch.randn(1, 3, 32, 32)
            assert_equal(saved_and_loaded(program).module()(images), net(images))

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

    @pytest.mark.parametrize("name", ["vigh", "mambavision-fused"])
    def test_changing_sizes_are_one_graph(self, name):
        """Attention, scans, norms, convolutions and gates with sizes that vary; the other families cost a minute."""
        net, graphs = random_backbone(name), []
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
