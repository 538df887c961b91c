"""The zoo through the entry points of mmpretrain, mmdet, mmseg and MMEngine, with small models and their files."""

import re
import warnings

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

import mmvssm
from mmvssm.apis import zoo
from mmvssm.checkpoints.families import get_family
from mmvssm.utils import model_index
from tests.helpers import ROOT

NAMES = {
    "mmpretrain": "vmamba-tiny-s1l8_8xb128_in1k",
    "mmdet": "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco",
    "mmseg": "vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512",
}
ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1))
WIDTHS = [8, 16, 32, 64]
SMALL = {
    "mmpretrain": {"head.in_channels": 64},
    "mmdet": {
        "neck.in_channels": WIDTHS,
        "neck.out_channels": 8,
        "rpn_head.in_channels": 8,
        "rpn_head.feat_channels": 8,
        "roi_head.bbox_roi_extractor.out_channels": 8,
        "roi_head.bbox_head.in_channels": 8,
        "roi_head.bbox_head.fc_out_channels": 16,
        "roi_head.mask_roi_extractor.out_channels": 8,
        "roi_head.mask_head.in_channels": 8,
        "roi_head.mask_head.conv_out_channels": 8,
        "roi_head.mask_head.num_convs": 1,
        "test_cfg.rpn.max_per_img": 20,
        "test_cfg.rcnn.max_per_img": 5,
    },
    "mmseg": {
        "decode_head.in_channels": WIDTHS,
        "decode_head.channels": 8,
        "auxiliary_head.in_channels": 32,
        "auxiliary_head.channels": 8,
    },
}
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def small_config(library: str) -> Config:
    """The config of the zoo with a backbone of 8 channels and images of 64 pixels."""
    cfg = Config.fromfile(zoo.config_path(NAMES[library]))
    cfg.merge_from_dict({f"model.{key}": value for key, value in SMALL[library].items()})
    cfg.model.backbone.arch = ARCH
    for step in [*cfg.test_dataloader.dataset.pipeline, *cfg.get("test_pipeline", [])]:
        if step.type == "Resize":
            step.scale = (96, 64)
        elif step.type == "ResizeEdge":
            step.scale = 72
        elif step.type == "CenterCrop":
            step.crop_size = 64
    return cfg


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """For each library a config, its model with random weights, and a file of it as the authors would have written."""
    folder = tmp_path_factory.mktemp("published")
    made = {}
    for library, name in NAMES.items():
        cfg = small_config(library)
        cfg.dump(folder / f"{name}.py")
        torch.manual_seed(0)
        config = cfg.copy()
        zoo._drop_pretrained(config.model)
        model = zoo._build(config, config.model)
        zoo._init_weights(model)
        for parameter in model.parameters():  # nothing that a fresh model could have by chance
            parameter.data += 0.01 * torch.randn_like(parameter)
        made[library] = folder / f"{name}.py", model.eval(), folder / f"{name}.pth"
        tensors = official(model, classifier=library == "mmpretrain")
        classes = ["a", "b"]
        meta = {"dataset_meta": {"classes": classes * 40, "palette": [(i, i, i) for i in range(80)]}}
        torch.save(
            {"model": tensors} if library == "mmpretrain" else {"state_dict": tensors, "meta": meta}, made[library][2]
        )
    return made


def official(model, classifier: bool) -> dict:
    """The state dict under the authors' names: of a detector or segmentor with `backbone.`, of a classifier without."""
    family = get_family("vmamba")
    own = {name.removeprefix("backbone.") for name, _ in model.named_parameters() if name.startswith("backbone.")}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone."):
            theirs = family.official_name(name.removeprefix("backbone."), own)
            theirs = theirs.replace("outnorm3", "classifier.norm") if classifier else f"backbone.{theirs}"
        else:
            theirs = name.replace("head.fc", "classifier.head") if classifier else name
        tensors[theirs] = tensor
    return tensors


@pytest.fixture
def zoo_of_small_ones(published, monkeypatch):
    """The zoo, with the small models and their files in the place of three of its models."""
    import mmpretrain
    from mmpretrain.apis.model import ModelHub

    mmpretrain.list_models("vmamba")  # fills the hub
    infos = {
        NAMES[library]: model_index.ModelInfo(NAMES[library], config, "VMamba", weights=str(file))
        for library, (config, _, file) in published.items()
    }
    monkeypatch.setattr(model_index, "published_models", lambda: infos)
    monkeypatch.setattr(zoo, "_configs", lambda: {name: info.config for name, info in infos.items()})
    entry, info = ModelHub._models_dict[NAMES["mmpretrain"]], infos[NAMES["mmpretrain"]]
    monkeypatch.setattr(entry, "config", str(info.config))
    monkeypatch.setattr(entry, "weights", info.weights)
    return published


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def same_weights(model, expected) -> bool:
    expected = expected.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


class TestMMPretrain:
    def test_list_models(self):
        import mmpretrain

        listed = mmpretrain.list_models("vmamba-*")
        published = [info for info in model_index.published_models().values() if info.name.startswith("vmamba-")]
        assert listed == sorted(info.name for info in published if "in1k" in info.name)
        assert len(mmpretrain.list_models("mambavision")) == 11
        assert "vim-tiny_8xb128_in1k" in mmpretrain.list_models(task="Image Classification")
        assert mmpretrain.list_models("mask-rcnn_vmamba*") == []  # mmpretrain could not build them
        assert "resnet50_8xb32_in1k" in mmpretrain.list_models("resnet50")

    def test_get_model(self, zoo_of_small_ones):
        import mmpretrain

        hub = zoo_of_small_ones["mmpretrain"][1]
        model = mmpretrain.get_model(NAMES["mmpretrain"])
        assert not same_weights(model, hub)
        assert model._metainfo.results[0].metrics["Top 1 Accuracy"] == 82.6
        model = mmpretrain.get_model(NAMES["mmpretrain"], pretrained=True)
        assert same_weights(model, hub)
        assert [
            f.shape[1]
            for f in mmpretrain.get_model(
                NAMES["mmpretrain"], backbone=dict(out_indices=(0, 1, 2, 3)), neck=None, head=None
            ).extract_feat(torch.zeros(1, 3, 64, 64))
        ] == WIDTHS

    def test_inference(self, zoo_of_small_ones):
        import mmpretrain

        model = mmpretrain.get_model(NAMES["mmpretrain"], pretrained=True)
        result = mmpretrain.inference_model(model, IMAGE)
        assert result["pred_scores"].shape == (1000,)
        assert result["pred_class"] == model._dataset_meta["classes"][result["pred_label"]]
        again = mmpretrain.ImageClassificationInferencer(NAMES["mmpretrain"], pretrained=True)(IMAGE)[0]
        np.testing.assert_array_equal(again["pred_scores"], result["pred_scores"])

    def test_by_config_and_file(self, published):
        import mmpretrain

        config, expected, file = published["mmpretrain"]
        assert same_weights(mmpretrain.get_model(str(config), pretrained=str(file)), expected)


class TestMMDetection:
    def test_init_and_inference_detector(self, published):
        from mmdet.apis import inference_detector, init_detector

        config, expected, file = published["mmdet"]
        model = init_detector(str(config), str(file), device="cpu")
        assert same_weights(model, expected)
        result = inference_detector(model, IMAGE)
        assert result.pred_instances.masks.shape[1:] == (48, 64)

    def test_inferencer_by_name(self, zoo_of_small_ones):
        from mmdet.apis import DetInferencer

        inferencer = DetInferencer(NAMES["mmdet"], device="cpu", show_progress=False)
        assert same_weights(inferencer.model, zoo_of_small_ones["mmdet"][1])
        result = inferencer(IMAGE, no_save_vis=True, no_save_pred=True, return_vis=True)
        assert result["predictions"][0].keys() >= {"bboxes", "labels", "scores"}
        assert result["visualization"][0].shape == IMAGE.shape

    def test_models_of_another_library(self, zoo_of_small_ones):
        from mmdet.apis import DetInferencer

        with pytest.raises(ValueError, match=r"is a model for segmentation, built by mmseg; .* models of mmdet"):
            DetInferencer(NAMES["mmseg"], device="cpu")

    def test_unknown_names_stay_unknown(self):
        from mmdet.apis import DetInferencer

        with pytest.raises(ValueError, match="Cannot find model: vmambaa in mmdet"):
            DetInferencer("vmambaa", device="cpu")

    def test_listing(self):
        from mmdet.apis import DetInferencer

        assert NAMES["mmdet"] in DetInferencer.list_models("mmvssm", "mask-rcnn.*")


class TestMMSegmentation:
    def test_init_and_inference_model(self, published):
        from mmseg.apis import inference_model, init_model

        config, expected, file = published["mmseg"]
        model = init_model(str(config), str(file), device="cpu")
        assert same_weights(model, expected)
        assert inference_model(model, IMAGE).pred_sem_seg.data.shape == (1, 48, 64)

    def test_inferencer_by_name(self, zoo_of_small_ones):
        from mmseg.apis import MMSegInferencer

        inferencer = MMSegInferencer(NAMES["mmseg"], dataset_name="ade20k", device="cpu")
        assert same_weights(inferencer.model, zoo_of_small_ones["mmseg"][1])
        result = inferencer(IMAGE, return_vis=True)
        assert result["predictions"].shape == (48, 64)
        assert result["visualization"].shape == IMAGE.shape


class TestModelsOfOurFunctions:
    """What `mmvssm.get_model` returns goes into the libraries' inference functions."""

    @pytest.fixture
    def model_of(self, zoo_of_small_ones):
        return lambda library: mmvssm.get_model(NAMES[library], checkpoint="official")

    def test_mmpretrain(self, model_of):
        from mmpretrain import inference_model

        result = inference_model(model_of("mmpretrain"), IMAGE)
        assert result["pred_class"] == inference_model(NAMES["mmpretrain"], IMAGE, pretrained=True)["pred_class"]

    def test_mmdet(self, model_of):
        from mmdet.apis import inference_detector

        init_default_scope("mmdet")
        model = model_of("mmdet")
        assert model.dataset_meta["classes"][0] == "person"
        assert inference_detector(model, IMAGE).pred_instances.masks.shape[1:] == (48, 64)

    def test_mmseg(self, model_of, published):
        from mmseg.apis import inference_model, init_model

        config, _, file = published["mmseg"]
        init_default_scope("mmseg")
        ours, theirs = model_of("mmseg"), init_model(str(config), str(file), device="cpu")
        assert len(ours.dataset_meta["classes"]) == 150
        labels = [inference_model(model, IMAGE).pred_sem_seg.data for model in (ours, theirs)]
        assert torch.equal(*labels)


class TestMMEngine:
    def test_load_checkpoint_of_another_variant_is_an_error(self, published):
        """MMEngine would go on with random weights."""
        from mmengine.runner import load_checkpoint

        _, _, file = published["mmpretrain"]
        model = zoo.get_model(NAMES["mmpretrain"], arch=dict(embed_dims=8, depths=(1, 2, 1, 1)))
        with pytest.raises(ValueError, match="does not fit this VMamba"):
            load_checkpoint(model, str(file), map_location="cpu")

    def test_own_files_are_loaded_by_mmengine(self, published, tmp_path):
        """A head of another size is left out, as for every model."""
        from mmengine.runner import load_checkpoint

        _, expected, _ = published["mmpretrain"]
        torch.save(
            {"state_dict": {"head.fc.bias": torch.ones(7), **expected.backbone.state_dict(prefix="backbone.")}},
            tmp_path / "own.pth",
        )
        model = zoo.get_model(
            NAMES["mmpretrain"],
            arch=ARCH,
        )
        load_checkpoint(model, str(tmp_path / "own.pth"), map_location="cpu")
        assert same_weights(model.backbone, expected.backbone)

    def test_hub_config(self):
        from mmengine.hub import get_config

        cfg = get_config("mmvssm::vmamba/vmamba-tiny-s1l8_8xb128_in1k.py", pretrained=True)
        assert cfg.model.backbone.arch == "tiny-s1l8"
        assert cfg.model_path == mmvssm.model_info("vmamba-tiny-s1l8").weights


def blocks_of_the_page() -> list[str]:
    text = (ROOT / "docs" / "zoo.md").read_text()
    return re.findall(r"^<!-- needs: network -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "code", blocks_of_the_page(), ids=lambda code: (re.findall(r"mm(?:pre|det|seg)\w*", code) or ["ours"])[0]
)
def test_the_page_runs(zoo_of_small_ones, tmp_path, monkeypatch, code):
    """What docs/zoo.md shows with published weights runs with the small models and files under the same names."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGE).save("image.jpg")
    exec(compile(code, "block", "exec"), {"__name__": "block"})
    for folder in re.findall(r'out_dir="(\w+)"', code):
        assert list((tmp_path / folder).rglob("*.jpg"))


@pytest.mark.parametrize(
    ("family", "title"), [("VMamba", None), ("MambaVision", None), ("ViG", "ViG and ViG-H"), ("Vim", None)]
)
def test_the_page_has_every_family(family, title):
    from mmvssm import models

    text = (ROOT / "docs" / "zoo.md").read_text()
    section = text.split(f"\n## {title or family}\n")[1].split("\n## ")[0]
    for arch in getattr(models, family).arch_zoo:
        assert f"`{arch}`" in section
    published = [info for info in model_index.published_models().values() if info.family == family]
    licenses = {info.license for info in published if info.license}
    assert len(licenses) == 1
    assert licenses.pop().split(",")[0] in section.replace("unclear: ", "")
    short = re.findall(r'get_backbone\("([\w-]+)", checkpoint="official"\)', section)
    assert short
    assert all(mmvssm.model_info(name).weights for name in short)


def test_what_mim_reads():
    """`mim search` and `mim download` go by the package model-index, and want the config beside the index."""
    from modelindex.load_model_index import load

    index = load(str(model_index.PACKAGE / ".mim" / "model-index.yml"))
    models = {model.name: model for model in index.models}
    assert list(models) == list(model_index.published_models())
    for name, model in models.items():
        assert model.weights == model_index.published_models()[name].weights
        assert (model_index.PACKAGE / ".mim" / model.config).is_file()
        assert {type(v) for v in model.metadata.data.values()} <= {int, str}
