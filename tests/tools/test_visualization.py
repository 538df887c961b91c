"""The pictures of receptive fields, scan orders and activations."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmvssm.analysis import contenders
from tests.analysis.micro import MICRO
from tests.tools.conftest import load_tool


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def colours(path, least=30):
    with Image.open(path) as picture:
        return {colour for count, colour in picture.convert("RGB").getcolors(1 << 22) if count >= least}


class TestReceptiveField:
    @pytest.fixture
    def tool(self, monkeypatch):
        """The tool with small networks; a checkpoint stands for larger weights."""

        def build_backbone(name, size, stage, checkpoint):
            net = MICRO[name]().eval()
            if checkpoint is not None:
                with torch.no_grad():
                    next(net.parameters()).mul_(float(checkpoint))
            return net

        monkeypatch.setattr(contenders, "build_backbone", build_backbone)
        return load_tool("visualization/effective_receptive_field")

    def test_models_side_by_side(self, tool, photo, tmp_path, capsys):
        out, table = tmp_path / "erf.png", tmp_path / "erf.json"
        argv = ["vmamba=2", "vim", "--size", "48", "64", "--images", str(photo), "--out", str(out)]
        assert tool.main([*argv, "--json", str(table), "--thresholds", "0.2", "0.9", "--device", "cpu"]) == 0
        content = json.loads(table.read_text())
        assert [(row["model"], row["state"]) for row in content["models"]] == [
            ("vmamba", "random weights"),
            ("vmamba", "trained"),
            ("vim", "random weights"),
        ]
        assert (content["size"], content["count"]) == ([48, 64], 1)
        for row in content["models"]:
            small, large = row["thresholds"]["0.2"], row["thresholds"]["0.9"]
            assert 1 <= small["side"] <= large["side"]
            assert 0 < small["area_share"] <= large["area_share"] <= 1
        assert capsys.readouterr().out.count("side of the square that holds 20%") == 3
        with Image.open(out) as picture:
            assert min(picture.width, picture.height) > 700  # two rows and two columns

    def test_noise(self, tool, tmp_path):
        argv = ["vigh", "--size", "32", "--count", "3", "--batch-size", "2", "--out", str(tmp_path / "erf.png")]
        assert tool.main([*argv, "--device", "cpu"]) == 0
        assert len(colours(tmp_path / "erf.png")) > 20

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (["--size", "1", "2", "3"], "--size takes one"),
            (["--count", "0"], "--count and --batch-size"),
            (["--thresholds", "1.5"], "shares between 0 and 1"),
            (["--images", "/nowhere"], "/nowhere"),
        ],
    )
    def test_mistakes(self, tool, tmp_path, capsys, options, sentence):
        assert tool.main(["vmamba", "--out", str(tmp_path / "erf.png"), *options]) == 2
        assert sentence in capsys.readouterr().err


class TestScanPaths:
    @pytest.fixture
    def tool(self):
        return load_tool("visualization/scan_paths")

    def test_every_family(self, tool, tmp_path, capsys):
        out = tmp_path / "scans.png"
        argv = ["vmamba", "vim", "mambavision", "vig", "vigh", "--grid", "5", "7", "--window-size", "4"]
        assert tool.main([*argv, "--out", str(out)]) == 0
        assert "mambavision: rows of 4 windows of 4 x 4" in capsys.readouterr().out
        assert {(0xE6, 0x9F, 0x00), (0xD5, 0x5E, 0x00)} <= colours(out, least=5)  # ends of paths, the class token

    def test_places_of_padding(self, tool):
        places = tool.places((4, -1, 9, -1), 5, (4, 6))
        assert places == [(4, 0), (5, 0), (4, 1), (5, 1)]
        assert tool.places((10, 11, -1, -1), 5, (0, 2)) == [(0, 2), (1, 2), (0, 3), (1, 3)]
        assert tool.places((0, 1, -2, 2), 3, (0, 3)) == [(0, 0), (1, 0), (2, 0)]

    @pytest.mark.parametrize("grid", [(1, 1), (1, 6), (5, 1)])
    @pytest.mark.parametrize("cls_token", ["double", "middle", "none"])
    def test_thin_grids(self, tool, tmp_path, grid, cls_token):
        argv = ["vim", "mambavision", "--cls-token", cls_token, "--grid", *map(str, grid)]
        assert tool.main([*argv, "--window-size", "2", "--out", str(tmp_path / "scans.png")]) == 0

    def test_mistake(self, tool, tmp_path, capsys):
        assert tool.main(["vim", "--grid", "0", "5", "--out", str(tmp_path / "scans.png")]) == 2
        assert "a grid of 0 x 5" in capsys.readouterr().err


class TestActivations:
    @pytest.fixture
    def tool(self):
        return load_tool("visualization/activations")

    def test_sheet_and_query(self, tool, photo, tmp_path):
        sheet, query = tmp_path / "sheet.png", tmp_path / "query.png"
        argv = ["vmamba-tiny-s1l8", str(photo), "--checkpoint", "random", "--out", str(sheet), "--device", "cpu"]
        argv += ["--stages", "0", "1"]
        assert tool.main([*argv, "--query", "50", "8", "--query-out", str(query)]) == 0
        with Image.open(sheet) as picture:
            assert picture.width > 3 * 224  # the image and two stages
        assert (86, 180, 233) in colours(query)  # the cross

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (["--query", "1", "2"], "--query and --query-out belong together"),
            (["--query", "56", "8", "--query-out", "q.png"], "--query 56 8 lies outside of the image, 56 x 40"),
            (["--size", "1", "2", "3"], "--size takes one"),
        ],
    )
    def test_mistakes(self, tool, photo, tmp_path, capsys, options, sentence):
        argv = ["vmamba-tiny-s1l8", str(photo), "--checkpoint", "random", "--out", str(tmp_path / "sheet.png")]
        assert tool.main([*argv, *options]) == 2
        assert sentence in capsys.readouterr().err
