"""The zoo: names, building through the owning libraries, weights."""

import socket
import subprocess
import sys

import pytest
import torch

import mmvssm
from mmvssm.apis import zoo
from mmvssm.checkpoints import convert_official
from mmvssm.checkpoints.families import get_family
from mmvssm.utils import model_index
from tests.checkpoints.official_files import CLASSES, GENERATIONS, vmamba_file
from tests.helpers import ROOT

SMALL = f"""
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmvssm.VMamba', arch={GENERATIONS["v2"]!r}, out_indices=(3,), drop_path_rate=0.1,
                  init_cfg=dict(type='Pretrained', checkpoint='https://example.org/absent.pth', prefix='backbone.')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes={CLASSES}, in_channels=64,
              loss=dict(type='CrossEntropyLoss', loss_weight=1.0)),
)
"""


@pytest.fixture
def small_zoo(tmp_path, monkeypatch):
    """A folder of configs with one small classifier and a few that only have names."""
    folder = tmp_path / "configs"
    for name, text in {
        "vmamba/vmamba-micro_8xb1_in1k.py": SMALL,
        "vmamba/vmamba-micro_8xb1_in1k-384px.py": "_base_ = './vmamba-micro_8xb1_in1k.py'",
        "vmamba/mask-rcnn_vmamba-micro_fpn_1x_coco.py": "_base_ = ['mmdet::_base_/default_runtime.py']",
        "vmamba/vmamba-micro_upernet_4xb4_ade20k.py": "_base_ = ['../_base_/schedule.py', 'mmseg::_base_/a.py']",
        "_base_/schedule.py": "lr = 1",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(zoo, "_config_folder", lambda: folder)
    zoo._configs.cache_clear()
    zoo._task.cache_clear()
    yield folder
    zoo._configs.cache_clear()
    zoo._task.cache_clear()


class TestNames:
    def test_of_the_package(self):
        names = mmvssm.list_models()
        assert names == sorted(set(names))
        assert "vmamba-tiny-s1l8_8xb128_in1k" in names
        assert mmvssm.list_models("mask-rcnn_*tiny-s1l8*_1x_coco") == ["mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco"]
        assert not [n for n in names if n.startswith("swin")]  # baselines are not models of this project
        tasks = [mmvssm.list_models(task=t) for t in ("classification", "detection", "segmentation")]
        assert sorted(n for names_of_task in tasks for n in names_of_task) == names, (
            "every config belongs to exactly one task"
        )
        assert all("in1k" in n or "imagenet" in n for n in tasks[0])

    def test_every_published_variant_has_a_short_name(self):
        from mmvssm.models.backbones import VMamba

        for arch in VMamba.arch_zoo:
            stem = zoo.config_path(f"vmamba-{arch}").stem
            assert stem.startswith(f"vmamba-{arch}_")
            assert stem.endswith("_in1k")

    def test_tasks_are_read_from_the_text(self, small_zoo):
        assert zoo.list_models(task="classification") == ["vmamba-micro_8xb1_in1k", "vmamba-micro_8xb1_in1k-384px"]
        assert zoo.list_models(task="detection") == ["mask-rcnn_vmamba-micro_fpn_1x_coco"]
        assert zoo.list_models(task="segmentation") == ["vmamba-micro_upernet_4xb4_ade20k"]

    def test_unknown_task(self):
        with pytest.raises(ValueError, match=r"task must be one of .*'detection'.* got 'pose'"):
            mmvssm.list_models(task="pose")

    @pytest.mark.parametrize("name", ["vmamba-tiny-s1l9", "vmamba-tiny-s1l8_8xb128", "vmamba_tiny_s1l8"])
    def test_unknown_name_suggests_near_ones(self, name):
        with pytest.raises(ValueError, match=f"no model named {name!r}; did you mean .*vmamba-tiny-s1l8"):
            mmvssm.get_model(name)

    def test_hopeless_name(self):
        with pytest.raises(ValueError, match="no model named 'xyz'; see mmvssm"):
            mmvssm.get_backbone("xyz")

    def test_configs_of_an_installed_package(self, tmp_path, monkeypatch):
        package = tmp_path / "site" / "mmvssm"
        (package / ".mim" / "configs").mkdir(parents=True)
        monkeypatch.setattr(model_index, "PACKAGE", package)
        assert zoo._config_folder() == package / ".mim" / "configs"
        monkeypatch.setattr(model_index, "PACKAGE", tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match="configs of mmvssm were not found"):
            zoo._config_folder()


class TestSmallClassifier:
    def test_short_name_builds_the_plainest_config(self, small_zoo):
        model = zoo.get_model("vmamba-micro")
        assert type(model).__module__.startswith("mmpretrain.")
        assert not model.training
        assert model.backbone.drop_path_rate == 0.1
        with torch.no_grad():
            assert model(torch.randn(1, 3, 40, 56)).shape == (1, CLASSES)

    def test_overrides_go_to_the_backbone(self, small_zoo):
        assert zoo.get_model("vmamba-micro", drop_path_rate=0.0, frozen_stages=2).backbone.frozen_stages == 2
        with pytest.raises(TypeError, match="no argument 'drop_rate'"):
            zoo.get_model("vmamba-micro", drop_rate=0.1)

    @pytest.mark.parametrize("wrapper", ["model", "state_dict"])
    def test_official_file(self, small_zoo, tmp_path, wrapper):
        tensors = vmamba_file("v2", "single-file")
        torch.save({wrapper: tensors}, tmp_path / "official.pth")
        model = zoo.get_model("vmamba-micro", checkpoint=tmp_path / "official.pth")
        expected = convert_official(tensors)
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())

    def test_own_file(self, small_zoo, tmp_path):
        source = zoo.get_model("vmamba-micro")
        torch.save({"state_dict": source.state_dict()}, tmp_path / "own.pth")
        image = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(zoo.get_model("vmamba-micro", tmp_path / "own.pth")(image), source(image))

    def test_backbone_alone(self, small_zoo, tmp_path):
        torch.save(vmamba_file("v2", "current", dense=True), tmp_path / "dense.pth")
        net = zoo.get_backbone("vmamba-micro", tmp_path / "dense.pth", out_indices=(1, 3))
        assert not net.training
        with torch.no_grad():
            assert [m.shape[1] for m in net(torch.randn(1, 3, 32, 32))] == [16, 64]
        assert torch.equal(net.norm1.weight, vmamba_file("v2", "current", dense=True)["outnorm1.weight"])
        assert zoo.get_backbone("vmamba-micro").out_indices == (3,)

    def test_wrong_file(self, small_zoo, tmp_path):
        torch.save({"model": vmamba_file("v0", "legacy")}, tmp_path / "v0.pth")
        with pytest.raises(ValueError, match="does not fit this ImageClassifier: it holds a VMamba"):
            zoo.get_model("vmamba-micro", tmp_path / "v0.pth")

    def test_fresh_weights_are_initialised_and_quiet(self, small_zoo, capsys):
        model = zoo.get_model("vmamba-micro")
        assert model.backbone.stages[0].blocks[0].mlp.fc1.weight.std() < 0.05  # truncated normal, not torch's default
        assert "fc1" not in capsys.readouterr().out

    def test_default_scope_is_left_as_it_was(self, small_zoo):
        from mmengine.registry import DefaultScope

        before = DefaultScope.get_current_instance()
        zoo.get_model("vmamba-micro")
        assert DefaultScope.get_current_instance() is before

    def test_normalises_as_its_config_says(self, small_zoo):
        """Classifiers have their preprocessor at the top of the config."""
        text = SMALL + "data_preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)\n"
        (small_zoo / "vmamba" / "vmamba-micro_8xb1_in1k.py").write_text(text)
        model = zoo.get_model("vmamba-micro")
        assert model.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
        assert model.data_preprocessor.to_rgb

    def test_a_library_that_is_not_installed(self, small_zoo, monkeypatch):
        monkeypatch.setitem(sys.modules, "mmpretrain.registry", None)
        with pytest.raises(ImportError, match=r"needs mmpretrain .*pip install \"mmvssm\[openmmlab\]\""):
            zoo.get_model("vmamba-micro")

    def test_a_config_whose_bases_are_not_installed(self, small_zoo, monkeypatch):
        def fail(path):
            raise ModuleNotFoundError("mmpretrain is not installed")

        monkeypatch.setattr(zoo.Config, "fromfile", fail)
        with pytest.raises(ImportError, match=r"builds on a library that is not installed \(mmpretrain.*pip install"):
            zoo.get_model("vmamba-micro")

    def test_a_config_of_no_known_library(self, small_zoo):
        (small_zoo / "vmamba" / "vmamba-micro_8xb1_in1k.py").write_text(SMALL.replace("mmpretrain", "mmpose"))
        with pytest.raises(ValueError, match=r"default_scope must be one of .*'mmdet'.*got 'mmpose'"):
            zoo.get_model("vmamba-micro_8xb1_in1k")


class TestLibraries:
    """Real configs of each library; nothing may be downloaded, though they name pretrained backbones."""

    @pytest.fixture(autouse=True)
    def _offline(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("the zoo downloads only what `checkpoint` names")

        monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)

    @pytest.mark.parametrize(
        ("name", "library"),
        [
            ("vmamba-tiny-s1l8", "mmpretrain"),
            ("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", "mmdet"),
            ("vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512", "mmseg"),
        ],
    )
    def test_build(self, name, library):
        arch = dict(embed_dims=96, depths=(1, 1, 1, 1))  # the widths of the config, so that necks and heads fit
        model = mmvssm.get_model(name, arch=arch)
        assert type(model).__module__.startswith(f"{library}.")
        assert type(model.backbone).__name__ == "VMamba"
        assert not model.training

    def test_detector_file_of_the_authors(self, tmp_path):
        """A runner checkpoint with their backbone names and mmdet's own for everything else."""
        name, arch = "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", dict(embed_dims=96, depths=(1, 1, 1, 1))
        source = mmvssm.get_model(name, arch=arch)
        own = {n.removeprefix("backbone.") for n, _ in source.named_parameters() if n.startswith("backbone.")}
        rename = get_family("vmamba").official_name
        theirs = {
            "backbone." + rename(k.removeprefix("backbone."), own) if k.startswith("backbone.") else k: v
            for k, v in source.state_dict().items()
        }
        assert "backbone.layers.0.blocks.0.op.A_logs" in theirs
        assert "backbone.outnorm2.bias" in theirs
        torch.save({"meta": {"epoch": 12}, "state_dict": theirs, "message_hub": {}}, tmp_path / "det.pth")
        loaded = mmvssm.get_model(name, checkpoint=tmp_path / "det.pth", arch=arch)
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())

    def test_backbone_of_a_classifier_with_class_token_gives_maps(self):
        small = dict(embed_dims=8, depth=2, patch_size=8)
        net = mmvssm.get_backbone("vim-tiny", arch=small, out_indices=(0, 1))
        x = torch.zeros(1, 3, 16, 24)
        with torch.no_grad():
            assert [tuple(m.shape) for m in net(x)] == [(1, 8, 2, 3)] * 2
            net = mmvssm.get_backbone("vim-tiny", arch=small, out_indices=(1,), out_type="cls_token")
            assert [tuple(m.shape) for m in net(x)] == [(1, 8)]

    def test_backbone_of_a_detector(self):
        net = mmvssm.get_backbone("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", arch=GENERATIONS["v2"])
        assert net.out_indices == (0, 1, 2, 3)


@pytest.fixture
def no_network(monkeypatch):
    """Whatever opens a socket fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class TestPublished:
    def test_everything_but_weights_works_without_a_network(self, no_network):
        """Listing, describing and building, of a model that has weights to download."""
        import mmpretrain

        assert len(mmvssm.list_models()) > 150
        assert "vmamba-tiny-s1l8_8xb128_in1k" in mmpretrain.list_models("vmamba")
        infos = [mmvssm.model_info(name) for name in mmvssm.list_models()]
        assert sum(info.weights is not None for info in infos) > 50
        arch = dict(embed_dims=8, depths=(1, 1, 1, 1))
        mmvssm.get_backbone("mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco", arch=arch)
        with pytest.raises(AssertionError, match="a network was asked for"):  # the test would see it
            torch.hub.download_url_to_file("http://127.0.0.1:1/vig.pth", "vig.pth")

    def test_info(self):
        info = mmvssm.model_info("vig-tiny")
        assert (info.name, info.family, info.tasks) == ("vig-tiny_8xb128_in1k", "ViG", ("classification",))
        assert (info.parameters, info.flops, info.input_size) == (5_834_536, 1_176_000_000, (224, 224))
        assert info.results == {"Top 1 Accuracy": 77.2}
        assert info.file_name == "vig_t_77p2acc.pth"
        assert len(info.sha256) == 64
        assert info.license == "Apache-2.0"
        assert info.suspect[0]["Figures"] == ["Published FLOPs"]
        detector = mmvssm.model_info("mask-rcnn_vmamba-small-s2l15_fpn_1x_coco")
        assert detector.tasks == ("detection",)
        assert (detector.results["box AP"], detector.results["mask AP"]) == (48.7, 43.7)
        assert detector.published == {"Parameters": "70 M", "FLOPs": "384 G"}

    def test_info_of_what_has_no_results(self):
        info = mmvssm.model_info("mask-rcnn_vig-tiny_simfpn_1x_coco")
        assert (info.family, info.results, info.weights, info.license) == ("ViG", {}, None, None)
        assert info.config.stem == info.name
        with pytest.raises(ValueError, match="no model named 'vig-tinyy'; did you mean vig-tiny"):
            mmvssm.model_info("vig-tinyy")

    @pytest.mark.parametrize("name", list(model_index.published_models()))
    def test_every_published_file_is_one_line(self, name):
        """Every entry with a file gives its address, under its own name, its short name and that of its config."""
        info = model_index.published_models()[name]
        assert zoo.config_path(name) == info.config
        if info.weights is not None:
            assert zoo.resolve_checkpoint(name, "official") == info.weights
            if name == info.config.stem and "in1k" in name:
                assert zoo.resolve_checkpoint(name.partition("_")[0], "official") == info.weights

    def test_other_checkpoints_are_left_alone(self, tmp_path):
        for given in (None, "a.pth", tmp_path / "official", "https://example.org/official"):
            assert zoo.resolve_checkpoint("vig-tiny", given) is given

    @pytest.mark.parametrize("build", [mmvssm.get_model, mmvssm.get_backbone])
    def test_without_published_weights(self, build):
        with pytest.raises(ValueError, match=r"no weights for 'mask-rcnn_vig-t.*_coco'; .* classifier 'vig-tiny'\.$"):
            build("mask-rcnn_vig-tiny_simfpn_1x_coco", checkpoint="official")

    @pytest.mark.parametrize("build", [zoo.get_model, zoo.get_backbone])
    def test_official_downloads_and_loads(self, small_zoo, tmp_path, monkeypatch, build):
        """From the address in the metafile, here with a file in the cache."""
        url = "https://example.org/vmamba-micro.pth"
        config = small_zoo / "vmamba" / "vmamba-micro_8xb1_in1k.py"
        info = model_index.ModelInfo(config.stem, config, "VMamba", weights=url)
        monkeypatch.setattr(model_index, "published_models", lambda: {info.name: info})
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        (tmp_path / "checkpoints").mkdir()
        torch.save({"model": vmamba_file("v2", "current")}, tmp_path / "checkpoints" / "vmamba-micro.pth")
        model = build("vmamba-micro", checkpoint="official")
        backbone = getattr(model, "backbone", model)
        expected = convert_official(vmamba_file("v2", "current"))["backbone.patch_embed.conv1.weight"]
        assert torch.equal(backbone.patch_embed.conv1.weight, expected)


def test_lazy_imports():
    """`import mmvssm` loads neither torch nor MMEngine; the functions come with their first use."""
    code = "import sys, mmvssm; assert not {'torch', 'mmengine'} & set(sys.modules); print(len(mmvssm.list_models()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
