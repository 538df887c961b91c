"""Feature export: levels of a neck, resized maps, their places in the image."""

import pytest
import torch

import mmvssm
from mmvssm.apis.feature_files import FeatureFile
from mmvssm.apis.feature_network import build_network, read_config
from mmvssm.apis.features import read_features, read_manifest

from .feature_inputs import CONFIG, FPN, PLAIN, QUICK, save_noise


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, text in (("fpn", FPN), ("plain", PLAIN), ("classifier", CONFIG)):
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    save_noise(path, (70, 100))
    return path


def only_file(out, **options):
    (record,) = read_manifest(out)
    return read_features(out / record["file"], **options)


class TestLevels:
    def test_of_an_fpn(self, configs, image, tmp_path):
        mmvssm.extract_features(configs / "fpn.py", image, tmp_path / "out", neck=True, pad_divisor=32, **QUICK)
        features = only_file(tmp_path / "out")
        assert features.stages == (1, 2, 3, "neck0", "neck1", "neck2", "neck3")
        assert [features.stride(s) for s in features.stages] == [8, 16, 32, 8, 16, 32, 64]
        assert [tuple(features.tensors[f"neck{i}"].shape) for i in range(4)] == [
            (4, 12, 16), (4, 6, 8), (4, 3, 4), (4, 2, 2),
        ]  # fmt: skip
        from mmdet.registry import MODELS

        torch.manual_seed(0)
        neck = MODELS.build(read_config(configs / "fpn.py").model.neck).eval()
        network = build_network(read_config(configs / "fpn.py"), "random", None, True, torch.device("cpu"))
        neck.load_state_dict(network.neck.state_dict())
        with torch.no_grad():
            expected = neck(tuple(features.tensors[i][None] for i in (1, 2, 3)))
        for i, level in enumerate(expected):
            torch.testing.assert_close(features.tensors[f"neck{i}"], level[0], rtol=1e-5, atol=1e-5)
        boxes = features.cell_boxes("neck3")  # 64 pixels each
        assert boxes[1, 1].tolist() == [64, 64, 128, 128]
        assert features.content("neck3").shape == (4, 2, 2)
        assert features.content("neck0").shape == (4, 9, 13)

    def test_of_a_plain_backbone(self, configs, image, tmp_path):
        mmvssm.extract_features(
            configs / "plain.py", image, tmp_path / "out", "random", (), neck=(0, -1), size=(64, 64), num_workers=0,
            device="cpu", progress=False, format="hdf5", visualize=True,
        )  # fmt: skip
        features = only_file(tmp_path / "out")
        assert features.stages == ("neck0", "neck4")
        assert [features.stride(s) for s in features.stages] == [4, 64]
        assert [tuple(t.shape) for t in features.tensors.values()] == [(4, 16, 16), (4, 1, 1)]
        assert features.cell_boxes("neck4")[0, 0].tolist() == [0, 0, 100, 70]

    def test_chosen_stages_beside_them(self, configs, image, tmp_path):
        mmvssm.extract_features(configs / "fpn.py", image, tmp_path / "out", "random", -1, neck=1, **_quick())
        assert only_file(tmp_path / "out").stages == (3, "neck1")
        assert only_file(tmp_path / "out", stages="neck1").stages == ("neck1",)
        with pytest.raises(ValueError, match=r"stages must be among \(3, 'neck1'\) in .*, got 2"):
            only_file(tmp_path / "out", stages=(3, 2))

    def test_weights(self, configs, image, tmp_path):
        """Those of a whole detector; what is not of backbone and neck is left out, and a neck must be there."""
        network = build_network(read_config(configs / "fpn.py"), "random", None, True, torch.device("cpu"))
        state = {k: v + 0.01 if v.is_floating_point() else v for k, v in network.state_dict().items()}
        torch.save({"state_dict": {**state, "rpn_head.rpn_conv.weight": torch.zeros(1)}}, tmp_path / "all.pth")
        loaded = build_network(read_config(configs / "fpn.py"), tmp_path / "all.pth", None, True, torch.device("cpu"))
        assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
        backbone = {k: v for k, v in state.items() if k.startswith("backbone.")}
        torch.save({"state_dict": backbone}, tmp_path / "backbone.pth")
        with pytest.raises(ValueError, match=r"checkpoint .*backbone\.pth: it holds no neck; .* whole detector"):
            build_network(read_config(configs / "fpn.py"), tmp_path / "backbone.pth", None, True, torch.device("cpu"))
        state["neck.fpn_convs.0.conv.weight"] = torch.zeros(2, 2, 1, 1)
        torch.save({"state_dict": state}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"checkpoint .*other\.pth: .* does not fit .*fpn_convs\.0\.conv"):
            build_network(read_config(configs / "fpn.py"), tmp_path / "other.pth", None, True, torch.device("cpu"))

    @pytest.mark.parametrize(
        ("config", "options", "error", "sentence"),
        [
            ("fpn", dict(neck=4), ValueError, r"neck must hold levels in -4\.\.3, got 4"),
            (
                "fpn",
                dict(neck=True, out_indices=0),
                ValueError,
                r"stages that it takes .*\(1, 2, 3\) .* got 0",
            ),
            (
                "fpn",
                dict(neck="all"),
                TypeError,
                "neck must be True, False, a level .* got 'all'",
            ),
            ("fpn", dict(neck=()), ValueError, "neck names no levels"),
            ("fpn", dict(out_indices=()), ValueError, r"out_indices=\(\) leaves nothing to write"),
            ("classifier", dict(neck=True), ValueError, "GlobalAveragePooling gives no maps"),
        ],
    )
    def test_refused(self, configs, image, tmp_path, config, options, error, sentence):
        with pytest.raises(error, match=sentence):
            mmvssm.extract_features(configs / f"{config}.py", image, tmp_path / "out", **QUICK, **options)
        assert not (tmp_path / "out").exists()

    def test_config_without_a_neck(self, configs, image, tmp_path):
        config = read_config(configs / "fpn.py")
        del config.model.neck
        with pytest.raises(ValueError, match=r"neck: .*fpn\.py has no model\.neck; detectors have one"):
            mmvssm.extract_features(config, image, tmp_path / "out", neck=True, **QUICK)


class TestMapSize:
    def test_covers_the_cells_that_touch_the_image(self, configs, image, tmp_path):
        common = dict(pad_divisor=64, neck=0, **_quick("random"))
        mmvssm.extract_features(configs / "fpn.py", image, tmp_path / "maps", **common)
        mmvssm.extract_features(
            configs / "fpn.py", image, tmp_path / "small", map_size=(3, 5), visualize=True, **common
        )
        maps, small = only_file(tmp_path / "maps"), only_file(tmp_path / "small")
        assert maps.tensors[1].shape == (16, 16, 16)
        content = maps.content(1)  # 70 x 100 pixels at stride 8
        assert content.shape == (16, 9, 13)
        assert {tuple(t.shape[1:]) for t in small.tensors.values()} == {(3, 5)}
        assert small.content(1) is small.tensors[1]
        expected = torch.nn.functional.interpolate(content[None], size=(3, 5), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(small.tensors[1], expected)
        boxes, extent = small.cell_boxes(1), small.extent(1)
        assert extent == (72, 104)
        assert boxes[-1, -1].tolist() == pytest.approx([4 / 5 * 104, 2 / 3 * 72, 104, 72])
        assert small.stride(1) == 8

    def test_a_smooth_map_stays_in_place(self, tmp_path):
        """The value at a place, read through the boxes of the cells, is the same before and after."""
        ramp = torch.arange(12.0).expand(1, 8, 12) * 16 + 8  # the x of the cell's centre, stride 16
        common = dict(original_size=[256, 384], content_size=[128, 192], network_size=[128, 192], pool=None)
        entry = dict(stage=0, stride=16, channels=1, shape=[1, 5, 7], resized_from=[8, 12])
        resized = torch.nn.functional.interpolate(ramp[None], size=(5, 7), mode="bilinear", antialias=True)[0]
        boxes = FeatureFile({**common, "stages": [entry]}, {0: resized}).cell_boxes(0)
        centres = (boxes[..., 0] + boxes[..., 2]) / 2 / 2  # of the original, twice as large
        # The window of the resizing meets the cells off their centres: up to a twentieth of a new cell of 27 pixels.
        torch.testing.assert_close(resized[0, :, 1:-1].double(), centres[:, 1:-1], rtol=0, atol=1.4)


def _quick(checkpoint=None):
    """QUICK where the checkpoint is given by position, or not at all."""
    quick = {k: v for k, v in QUICK.items() if k != "checkpoint"}
    return quick if checkpoint is None else {**quick, "checkpoint": checkpoint}
