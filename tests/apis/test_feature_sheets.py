"""Feature export: pictures."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

import mmvssm
from mmvssm.apis.feature_files import FeatureFile
from mmvssm.apis.feature_sheets import draw_sheet, energy_map, pca_map

from .feature_inputs import QUICK


class TestSheets:
    def record(self, shape, **changes):
        stage = dict(stage=2, stride=8, channels=shape[0], shape=list(shape))
        return dict(
            image="a.png",
            original_size=[40, 56],
            content_size=[40, 56],
            network_size=[64, 64],
            stages=[stage],
            pool=None,
            model="micro",
            checkpoint_sha256=None,
            dtype="float32",
        ) | changes  # fmt: skip

    def test_are_drawn_once(self, config, photos, tmp_path):
        mmvssm.extract_features(config, photos / "*.png", tmp_path / "out", **QUICK)
        mmvssm.extract_features(config, photos / "*.png", tmp_path / "out", visualize=True, **QUICK)
        sheets = sorted(p.name for p in (tmp_path / "out" / "sheets").iterdir())
        assert sheets == ["a.png.png", "b.png.png", "d.png.png"]
        times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "sheets").iterdir()}
        time.sleep(0.02)
        mmvssm.extract_features(config, photos / "*.png", tmp_path / "out", visualize=True, **QUICK)
        assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "sheets").iterdir()}
        with Image.open(tmp_path / "out" / "sheets" / "a.png.png") as sheet:
            assert sheet.mode == "RGB"
            assert sheet.width > 3 * 224
            assert sheet.height > 2 * 240  # 48 x 32, enlarged five times

    def test_energy_is_where_the_activation_is(self):
        maps = torch.full((4, 8, 8), 0.1)
        maps[:, 1, 5] = 3.0
        maps[:, 6:] = 100.0  # in the padding, which does not count
        energy, name, least, most = energy_map(FeatureFile(self.record((4, 8, 8)), {2: maps}), 2)
        assert energy.shape == (40, 56)
        assert (name, least, most) == ("energy", pytest.approx(0.1), pytest.approx(3.0))
        y, x = divmod(energy.argmax().item(), 56)
        assert (y // 8, x // 8) == (1, 5)
        assert energy.max() <= 1
        assert energy[30:, :30].max() < 0.01

    def test_energy_behind_a_layer_norm(self):
        maps = torch.ones(4, 8, 8)
        maps[::2] = -1.0
        maps[:, 2, 2] *= -1
        energy, name, _, _ = energy_map(FeatureFile(self.record((4, 8, 8)), {2: maps}), 2)
        assert name == "energy around the mean"
        y, x = divmod(energy.argmax().item(), 56)
        assert (y // 8, x // 8) == (2, 2)

    def test_components_separate_regions(self):
        maps = torch.zeros(6, 8, 8)
        maps[0, :, :4] = 1.0
        maps[1, :3] = 0.5
        components, share = pca_map(FeatureFile(self.record((6, 8, 8)), {2: maps}), 2)
        assert components.shape == (3, 40, 56)
        assert share == pytest.approx(1.0)
        corners = [components[:, y, x] for y in (4, 36) for x in (4, 52)]
        assert all((a - b).abs().max() > 0.4 for i, a in enumerate(corners) for b in corners[:i])
        assert ((components >= 0) & (components <= 1)).all()

    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (5, 1, 2)])
    def test_tiny_maps(self, shape):
        record = self.record(shape, network_size=[8, 16], content_size=[8, 16], original_size=[8, 16])
        sheet = draw_sheet(torch.zeros(3, 8, 16, dtype=torch.uint8), FeatureFile(record, {2: torch.randn(shape)}))
        assert np.isfinite(np.asarray(sheet)).all()
        assert sheet.height > 2 * 112

    def test_large_images_are_reduced(self):
        record = self.record((3, 4, 250), network_size=[32, 2000], content_size=[32, 2000], original_size=[32, 2000])
        image = torch.zeros(3, 32, 2000, dtype=torch.uint8)
        assert 2 * 1024 <= draw_sheet(image, FeatureFile(record, {2: torch.randn(3, 4, 250)})).width < 2 * 1100
