"""Feature export: values, geometry, input, failures, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mmvssm
from mmvssm.apis import features
from mmvssm.apis.feature_files import FeatureFile, content_cells
from mmvssm.apis.feature_images import Preprocessing, original_size, preprocessing_of
from mmvssm.apis.feature_network import build_network, read_config
from mmvssm.apis.feature_sources import find_images
from mmvssm.apis.feature_store import MANIFEST
from mmvssm.apis.features import read_features, read_manifest

from .feature_inputs import MEAN, QUICK, STD, contents, save_noise


class TestValues:
    @pytest.mark.parametrize("format", ["npz", "safetensors", "hdf5"])
    def test_are_those_of_the_backbone(self, config, photos, tmp_path, format):
        summary = mmvssm.extract_features(config, photos, tmp_path / "out", format=format, **QUICK)
        assert (summary.written, summary.reused, summary.failures) == (7, 0, {})
        backbone = build_network(read_config(config), "random", None, False, torch.device("cpu"))
        records = list(read_manifest(tmp_path / "out"))
        assert sorted(r["image"] for r in records) == sorted(e.name for e in find_images(photos))
        for record in records:
            features = read_features(tmp_path / "out" / record["file"])
            assert features.record == record
            pixels = torch.from_numpy(np.array(Image.open(record["path"]).convert("RGB"))).permute(2, 0, 1).float()
            x = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
            with torch.no_grad():
                expected = backbone(x[None])
            assert features.stages == (1, 3)
            for stage, maps in zip(features.stages, expected, strict=True):
                torch.testing.assert_close(features.tensors[stage], maps[0], rtol=1e-5, atol=1e-5)

    def test_record(self, config, photos, tmp_path):
        mmvssm.extract_features(config, photos / "c.jpg", tmp_path / "out", pad_divisor=32, out_indices=-1, **QUICK)
        (record,) = read_manifest(tmp_path / "out")
        assert record == {
            "image": "c.jpg",
            "path": str(photos / "c.jpg"),
            "file": "features/c.jpg.npz",
            "original_size": [40, 56],
            "content_size": [40, 56],
            "network_size": [64, 64],
            "stages": [{"stage": 3, "stride": 32, "channels": 64, "shape": [64, 2, 2]}],
            "pool": None,
            "map_size": None,
            "dtype": "float32",
            "preprocessing": {
                "mean": MEAN,
                "std": STD,
                "channel_order": "rgb",
                "interpolation": "bicubic",
                "size": None,
                "max_size": None,
                "pad_divisor": 32,
            },
            "model": "micro",
            "checkpoint": "random",
            "checkpoint_sha256": None,
            "version": mmvssm.__version__,
        }

    def test_weights_come_from_the_checkpoint(self, config, photos, tmp_path):
        import hashlib

        backbone = build_network(read_config(config), "random", None, False, torch.device("cpu"))
        state = {f"backbone.{k}": v + 0.01 if v.is_floating_point() else v for k, v in backbone.state_dict().items()}
        file = tmp_path / "weights.pth"
        torch.save({"state_dict": state}, file)
        quick = {**QUICK, "checkpoint": file}
        mmvssm.extract_features(config, photos / "a.png", tmp_path / "ours", **quick)
        mmvssm.extract_features(config, photos / "a.png", tmp_path / "random", **QUICK)
        ours, other = (read_features(tmp_path / f / "features/a.png.npz") for f in ("ours", "random"))
        assert ours.record["checkpoint_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert not torch.allclose(ours.tensors[3], other.tensors[3], atol=1e-2)

    @pytest.mark.parametrize("form", ["name", "file"])
    def test_official_weights_are_those_of_the_zoo(self, photos, tmp_path, monkeypatch, form):
        asked = []
        monkeypatch.setattr(features, "hash_checkpoint", lambda checkpoint: asked.append(checkpoint) or 1 / 0)
        model = "vig-tiny" if form == "name" else mmvssm.model_info("vig-tiny").config
        with pytest.raises(ZeroDivisionError):
            mmvssm.extract_features(model, photos, tmp_path / "out", **{**QUICK, "checkpoint": "official"})
        assert asked == [mmvssm.model_info("vig-tiny").weights]

    def test_a_short_name_of_the_zoo(self, config, photos, tmp_path, monkeypatch):
        from mmvssm.apis import zoo

        monkeypatch.setattr(zoo, "config_path", lambda name: config if name == "vmamba-micro" else None)
        summary = mmvssm.extract_features("vmamba-micro", photos / "a.png", tmp_path / "out", **QUICK)
        assert summary.written == 1

    @pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
    def test_mixed_precision(self, config, photos, tmp_path, dtype, torch_dtype):
        for name, kind in (("half", dtype), ("full", "fp32")):
            mmvssm.extract_features(
                config, photos / "a.png", tmp_path / name, dtype=kind, format="safetensors", **QUICK
            )
        half, full = (read_features(tmp_path / n / "features/a.png.safetensors") for n in ("half", "full"))
        for stage in (1, 3):
            assert half.tensors[stage].dtype == torch_dtype
            error = (half.tensors[stage].float() - full.tensors[stage]).abs().mean()
            assert 0 < error < 0.05 * full.tensors[stage].abs().mean()

    @pytest.mark.parametrize("pool", ["avg", "max"])
    def test_pooling_leaves_the_padding_out(self, config, photos, tmp_path, pool):
        common = dict(pad_divisor=128, **QUICK)
        mmvssm.extract_features(config, photos / "a.png", tmp_path / "maps", **common)
        mmvssm.extract_features(config, photos / "a.png", tmp_path / "pooled", pool=pool, **common)
        maps, pooled = (read_features(tmp_path / f / "features/a.png.npz") for f in ("maps", "pooled"))
        assert maps.tensors[1].shape[1:] == (16, 16)
        cells = maps.tensors[1][:, :6, :4].flatten(1)  # 48 x 32 pixels at stride 8
        torch.testing.assert_close(pooled.tensors[1], cells.mean(1) if pool == "avg" else cells.amax(1))
        with pytest.raises(ValueError, match="stage 1 is pooled"):
            pooled.content(1)

    def test_loading_by_workers_changes_nothing(self, config, photos, tmp_path):
        for name, workers in (("here", 0), ("there", 2)):
            mmvssm.extract_features(config, photos, tmp_path / name, **{**QUICK, "num_workers": workers})
        assert contents(tmp_path / "here") == contents(tmp_path / "there")


class TestGeometry:
    FILE = FeatureFile(
        dict(
            original_size=[100, 200],
            content_size=[50, 120],
            network_size=[64, 128],
            stages=[dict(stage=0, stride=16)],
            pool=None,
        ),
        {0: torch.zeros(3, 4, 8)},
    )

    def test_sizes(self):
        assert self.FILE.scale == (0.6, 0.5)
        assert self.FILE.padding == (14, 8)
        assert self.FILE.content(0).shape == (3, 4, 8)
        assert content_cells((13, 19), (200, 300), 16) == (13, 19)
        assert content_cells((8, 8), (33, 32), 16) == (3, 2)

    def test_points_and_boxes(self):
        points = torch.tensor([[60.0, 25.0], [120.0, 50.0]])
        assert self.FILE.to_original(points).tolist() == [[pytest.approx(100), 50], [pytest.approx(200), 100]]
        torch.testing.assert_close(self.FILE.to_network(self.FILE.to_original(points)), points)
        boxes = self.FILE.cell_boxes(0)
        assert boxes.shape == (4, 8, 4)
        assert boxes[0, 1].tolist() == pytest.approx([16 / 0.6, 0, 32 / 0.6, 32])
        with pytest.raises(ValueError, match=r"2 \(x, y\) or 4"):
            self.FILE.to_original(torch.zeros(3))
        with pytest.raises(ValueError, match=r"stage must be one of \(0,\), got 2"):
            self.FILE.cell_boxes(2)

    @pytest.mark.parametrize(
        ("size", "most", "divisor", "content", "network"),
        [
            (None, None, 1, (30, 45), (30, 45)),
            (60, None, 32, (60, 90), (64, 96)),
            ((20, 25), None, 1, (20, 25), (20, 25)),
            (60, 75, 1, (50, 75), (50, 75)),
            (None, 15, 4, (10, 15), (12, 16)),
            (None, 45, 1, (30, 45), (30, 45)),
        ],
    )
    def test_size_policy(self, size, most, divisor, content, network, tmp_path):
        preprocessing = Preprocessing((0.0,) * 3, (1.0,) * 3, "rgb", size=size, max_size=most, pad_divisor=divisor)
        save_noise(tmp_path / "a.png", (30, 45))
        pixels, original = preprocessing.load(tmp_path / "a.png")
        assert original == (30, 45)
        assert pixels.shape[1:] == preprocessing.content_size(30, 45) == content
        x = preprocessing.to_input(pixels[None])
        assert x.shape[2:] == preprocessing.network_size(30, 45) == network
        assert (x[..., content[0] :, :] == 0).all()
        assert (x[..., content[1] :] == 0).all()
        assert torch.equal(x[0, :, : content[0], : content[1]], pixels.float())


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("text", "order", "mean", "divisor"),
        [
            ("model = dict(data_preprocessor=dict(mean=[1, 2, 3], std=[1, 1, 1]))", "bgr", (1, 2, 3), 1),
            (
                "data_preprocessor = dict(mean=[1, 2, 3], std=[1, 1, 1], bgr_to_rgb=True, pad_size_divisor=32)\n"
                "model = dict(data_preprocessor=dict(mean=[4, 5, 6]))",
                "rgb",
                (4, 5, 6),
                32,
            ),
            ("model = dict(data_preprocessor=dict(bgr_to_rgb=True))", "rgb", None, 1),
            (
                "model = dict()\ntest_dataloader = dict(dataset=dict(dataset=dict(pipeline=[dict(type='Wrapper',"
                " transforms=[dict(type='Normalize', mean=[7, 8, 9], std=[1, 1, 1])])])))",
                "rgb",
                (7, 8, 9),
                1,
            ),
        ],
    )
    def test_comes_from_the_config(self, tmp_path, text, order, mean, divisor):
        from mmengine.config import Config

        (tmp_path / "c.py").write_text(text)
        found = preprocessing_of(Config.fromfile(tmp_path / "c.py"))
        assert (found.channel_order, found.mean, found.pad_divisor) == (order, mean, divisor)

    def test_config_without_any(self, tmp_path):
        from mmengine.config import Config

        (tmp_path / "c.py").write_text("model = dict()")
        with pytest.raises(ValueError, match=r"c\.py says nothing of preprocessing"):
            preprocessing_of(Config.fromfile(tmp_path / "c.py"))

    def test_channel_order(self, tmp_path):
        pixels = save_noise(tmp_path / "a.png", (4, 5))
        for order, expected in (("rgb", pixels), ("bgr", pixels[..., ::-1])):
            loaded, _ = Preprocessing(None, None, order).load(tmp_path / "a.png")
            assert (loaded.permute(1, 2, 0).numpy() == expected).all()

    def test_same_pixels_as_opencv(self, tmp_path):
        """What the libraries load: turned upright, 16 bits halved, any mode made three channels."""
        cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
        y, x = np.mgrid[:24, :40]
        smooth = np.stack([6 * x, 10 * y, 3 * (x + y)], -1).astype(np.uint8)
        image, exif = Image.fromarray(smooth), Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
        image.save(tmp_path / "turned.png", exif=exif)
        image.save(tmp_path / "turned.webp", exif=exif, lossless=True)
        image.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
        image.convert("L").save(tmp_path / "grey.png")
        image.convert("LA").save(tmp_path / "grey_alpha.png")
        image.convert("1").save(tmp_path / "black_and_white.png")
        image.quantize(32).save(tmp_path / "palette.png")
        Image.fromarray(np.dstack([smooth, smooth[..., :1]])).save(tmp_path / "alpha.png")
        Image.fromarray((smooth[..., 0].astype(np.uint16) << 8) + 77).save(tmp_path / "deep.png")
        Image.fromarray((smooth[..., 0].astype(np.uint16) << 8) + 77).save(tmp_path / "deep.tif")
        cv2.imwrite(str(tmp_path / "deep_rgb.png"), (smooth.astype(np.uint16) << 8) + 77)
        Image.fromarray(smooth[:1, :1]).save(tmp_path / "pixel.png")
        for name in sorted(path.name for path in tmp_path.iterdir()):
            loaded, size = Preprocessing(None, None, "bgr").load(tmp_path / name)
            expected = cv2.imread(str(tmp_path / name), cv2.IMREAD_COLOR)
            assert size == original_size(str(tmp_path / name)) == expected.shape[:2]
            # Decoders of JPEG may round differently.
            assert np.abs(loaded.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2 * name.endswith("jpg")


class TestFailures:
    def test_unreadable_images_are_passed_over(self, config, photos, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        save_noise(folder / "good.png", (40, 56))
        whole = (photos / "c.jpg").read_bytes()
        (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])  # its header is fine
        (folder / "text.png").write_text("no image")
        (folder / "empty.jpg").touch()
        summary = mmvssm.extract_features(config, folder, tmp_path / "out", **{**QUICK, "num_workers": 1})
        assert summary.written == 1
        assert sorted(summary.failures) == ["empty.jpg", "half.jpg", "text.png"]
        assert "truncated" in summary.failures["half.jpg"]
        lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
        assert {json.loads(line)["image"] for line in lines} == set(summary.failures)

        (folder / "half.jpg").write_bytes(whole)
        again = mmvssm.extract_features(config, folder, tmp_path / "out", **QUICK)
        assert (again.written, again.reused, sorted(again.failures)) == (1, 1, ["empty.jpg", "text.png"])

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_image_of_more_pixels_than_pillow_allows(self, config, tmp_path, monkeypatch):
        save_noise(tmp_path / "large.png", (30, 30))
        save_noise(tmp_path / "small.png", (10, 10))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
        summary = mmvssm.extract_features(config, tmp_path, tmp_path / "out", **QUICK)
        assert (summary.written, list(summary.failures)) == (1, ["large.png"])
        assert "more than 800 pixels" in summary.failures["large.png"]

    def test_features_that_are_not_finite(self, config, photos, tmp_path, monkeypatch):
        from mmvssm.apis import features

        def forward(*args):
            maps = original(*args)
            maps[1] = maps[1].clone()  # was made in inference mode
            maps[1][0, 0, 0, 0] = float("inf")
            return maps

        original = features.forward_batch
        monkeypatch.setattr(features, "forward_batch", forward)
        summary = mmvssm.extract_features(config, photos / "a.png", tmp_path / "out", **QUICK)
        assert summary.failures == {"a.png": "features of stage 3 are not finite in float32"}
        assert not list(read_manifest(tmp_path / "out"))

    def test_size_that_the_network_refuses(self, config, tmp_path, monkeypatch):
        from mmvssm.models import VMamba

        def forward(self, x):
            self.check_input(x, min_size=16)
            return original(self, x)

        original = VMamba.forward
        monkeypatch.setattr(VMamba, "forward", forward)
        save_noise(tmp_path / "a.png", (3, 40))
        save_noise(tmp_path / "b.png", (32, 40))
        summary = mmvssm.extract_features(config, tmp_path, tmp_path / "out", **QUICK)
        assert summary.written == 1
        assert "at least 16 x 16 pixels, got 3 x 40" in summary.failures["a.png"]


BAD_ARGUMENTS = {
    "format": (dict(format="pth"), "format must be one of 'npz', 'safetensors', 'hdf5', got 'pth'"),
    "dtype": (dict(dtype="int8"), "dtype must be one of 'fp32', 'fp16', 'bf16', got 'int8'"),
    "pool": (dict(pool="sum"), "pool must be one of None, 'avg', 'max', got 'sum'"),
    "bf16 as npz": (dict(dtype="bf16"), "use format='safetensors'"),
    "pooled sheets": (dict(pool="avg", visualize=True), "needs maps, but pool='avg'"),
    "batch size": (dict(batch_size=0), "batch_size must be an integer of at least 1, got 0"),
    "workers": (dict(num_workers=-1), "num_workers must be an integer of at least 0, got -1"),
    "divisor": (dict(pad_divisor=0), "pad_divisor must be a positive integer or None, got 0"),
    "size": (dict(size=(1, 2, 3)), r"size must be None, a positive integer or a pair .* got \(1, 2, 3\)"),
    "no size": (dict(size=0), "size must be None, .* got 0"),
    "long edge": (dict(max_size=0), "max_size must be a positive integer or None, got 0"),
    "long edge of a fixed size": (dict(size=(8, 8), max_size=9), r"max_size=9 has no meaning beside size=\(8, 8\)"),
    "size of maps": (dict(map_size="7"), "map_size must be None, a positive integer or a pair .* got '7'"),
    "size of vectors": (dict(map_size=7, pool="max"), r"map_size=\(7, 7\) needs maps, but pool='max'"),
    "split": (dict(dataset="valid"), "dataset must be one of None, 'train', 'val', 'test', got 'valid'"),
    "images twice": (dict(dataset="val"), "dataset='val' brings its images along: give images=None"),
    "stages": (dict(out_indices=(0, 4)), r"out_indices=\(0, 4\) must hold stages in -4\.\.3"),
    "no device": (dict(device="gpu"), "device must be such as 'cpu' or 'cuda:0', got 'gpu'"),
    "absent device": (dict(device="cuda:99"), r"device='cuda:99': torch finds \d+ CUDA GPUs here"),
    "no checkpoint": (dict(checkpoint=None), "checkpoint must be a path or URL of weights, 'official' for"),
    "official of no model of the zoo": (dict(checkpoint="official"), "There is no model named 'micro'"),
}


class TestRefused:
    @pytest.mark.parametrize("case", BAD_ARGUMENTS)
    def test_bad_arguments(self, config, photos, tmp_path, case):
        change, sentence = BAD_ARGUMENTS[case]
        with pytest.raises(ValueError, match=sentence):
            mmvssm.extract_features(config, photos, tmp_path / "out", **{**QUICK, **change})
        assert not (tmp_path / "out").exists()

    def test_no_images(self, config, tmp_path):
        with pytest.raises(ValueError, match="images must be given, or dataset='train', 'val' or 'test'"):
            mmvssm.extract_features(config, None, tmp_path / "out", **QUICK)
        with pytest.raises(ValueError, match=r"image_root='a' is for COCO files \(\.json\) only"):
            mmvssm.extract_features(config, None, tmp_path / "out", dataset="val", image_root="a", **QUICK)

    def test_model_that_is_none(self, photos, tmp_path):
        with pytest.raises(TypeError, match="model must be a name, a config file or a Config, got int"):
            mmvssm.extract_features(3, photos, tmp_path / "out", **QUICK)
        (tmp_path / "broken.py").write_text("model = dict(")
        with pytest.raises(ValueError, match=r"The config .*broken\.py cannot be read \(SyntaxError"):
            mmvssm.extract_features(tmp_path / "broken.py", photos, tmp_path / "out", **QUICK)
        (tmp_path / "empty.py").write_text("default_scope = 'mmdet'")
        with pytest.raises(ValueError, match=r"empty\.py has no model\.backbone"):
            mmvssm.extract_features(tmp_path / "empty.py", photos, tmp_path / "out", **QUICK)

    def test_format_without_its_package(self, config, photos, tmp_path, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match="format='hdf5' needs the package h5py: pip install h5py"):
            mmvssm.extract_features(config, photos, tmp_path / "out", format="hdf5", **QUICK)

    def test_missing_files(self, config, photos, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.pth"):
            mmvssm.extract_features(config, photos, tmp_path / "out", **{**QUICK, "checkpoint": "absent.pth"})
        with pytest.raises(FileNotFoundError, match=r"no config file absent\.py"):
            mmvssm.extract_features("absent.py", photos, tmp_path / "out", **QUICK)
        with pytest.raises(ValueError, match="There is no model named 'vmamba-tiny-s1l9'; did you mean"):
            mmvssm.extract_features("vmamba-tiny-s1l9", photos, tmp_path / "out", **QUICK)

    def test_reading_what_is_no_feature_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"path must end in \.npz, \.safetensors, \.h5"):
            read_features(tmp_path / "a.pth")
        with pytest.raises(FileNotFoundError, match="no feature file"):
            read_features(tmp_path / "a.npz")
        np.savez(tmp_path / "a.npz", x=np.zeros(3))
        (tmp_path / "b.npz").write_bytes(b"PK")
        (tmp_path / "c.safetensors").write_bytes(b"abc")
        (tmp_path / "d.h5").write_bytes(b"abc")
        for name in ("a.npz", "b.npz", "c.safetensors", "d.h5"):
            with pytest.raises(ValueError, match="is no feature file, or damaged"):
                read_features(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=f"holds no features: {MANIFEST}"):
            read_manifest(tmp_path)


class TestProgress:
    def test_lines(self, capsys, monkeypatch):
        """Finished before are counted, but not in the speed and the remaining time."""
        from mmvssm.apis import feature_progress

        clock = iter([0.0, 40.0, 40.0, 40.0, 50.0, 80.0, 80.0])
        monkeypatch.setattr(feature_progress.time, "perf_counter", lambda: next(clock))
        with feature_progress.Progress("images", 4000, 100, show=True) as bar:
            bar.advance(10)  # told after 30 seconds
            bar.advance(10)  # not yet again
        first, last = capsys.readouterr().err.splitlines()
        assert first == "110/4000 images, 0.2 images/s, 4:19:20 left"
        assert last.startswith("120/4000 images, 0.2 images/s, ")

    def test_bar(self, capsys, monkeypatch):
        from mmvssm.apis.feature_progress import Progress

        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        with Progress("images", 3, 1, show=True) as bar:
            bar.advance(2)
        shown = capsys.readouterr().err
        assert "3/3" in shown
        assert "images/s" in shown
        assert "left" in shown

    def test_silence(self, capsys):
        from mmvssm.apis.feature_progress import Progress

        with Progress("images", 3, 1, show=False) as bar:
            bar.advance(2)
        assert not capsys.readouterr().err
