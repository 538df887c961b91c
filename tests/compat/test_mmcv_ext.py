import importlib.machinery

import pytest
import torch

from mmvssm.compat import mmcv_ext
from mmvssm.compat.nms import nms as plain_nms
from mmvssm.compat.roi_align import roi_align as plain_roi_align
from mmvssm.compat.roi_align import roi_align_backward as plain_roi_align_backward
from tests.compat.fresh_python import run_python, write_package

# Stands for a compiled module: like the real one it takes float32 only and writes into its arguments.
COMPILED = """
import torch

def nms(boxes, scores, iou_threshold, offset):
    assert boxes.dtype == scores.dtype == torch.float32 and boxes.is_contiguous()
    return torch.arange(len(boxes))

def roi_align_forward(input, rois, output, argmax_y, argmax_x, **kwargs):
    assert input.dtype == rois.dtype == output.dtype == torch.float32 and input.is_contiguous()
    output.fill_(input.sum() + rois.sum())

def roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, **kwargs):
    assert grad_output.dtype == grad_input.dtype == torch.float32 and grad_input.is_contiguous()
    grad_input.fill_(grad_output.sum())

def deform_conv_forward():
    return "compiled"
"""
CALLS = """
def call(dtype, pool_mode=1):
    x, out = torch.ones(1, 1, 2, 2, dtype=dtype).transpose(2, 3), torch.zeros(1, 1, 1, 1, dtype=dtype)
    rois = torch.tensor([[0, 1, 1, 1, 1]], dtype=dtype)
    none = torch.zeros(0, dtype=dtype)
    options = dict(spatial_scale=1.0, sampling_ratio=2, pool_mode=pool_mode, aligned=True)
    options |= dict(aligned_height=1, aligned_width=1)
    ext.roi_align_forward(x, rois, out, none, none, **options)
    grad = torch.zeros_like(x)
    ext.roi_align_backward(out, rois, none, none, grad, **options)
    return out, grad, ext.nms(rois[:, 1:], rois[:, 0], iou_threshold=0.5, offset=0)
"""
# Spares the import of the real one, which is slow.
NO_TORCHVISION = {"torchvision/__init__.py": "raise ImportError('not in this test')"}


def test_absent_module_is_replaced(tmp_path):
    write_package(tmp_path, {"mmcv/__init__.py": "", **NO_TORCHVISION})
    out = run_python(
        "import sys, mmvssm\n"
        "assert not {'torch', 'torchvision'} & set(sys.modules)\n"
        "import importlib, importlib.util, pkgutil\n"
        "assert importlib.util.find_spec('mmcv._ext') is not None\n"
        "ext = importlib.import_module('mmcv._ext')\n"
        "assert ext.__spec__.name == 'mmcv._ext' and hasattr(ext, 'deform_conv_forward')\n"
        "assert importlib.util.find_spec('mmcv._other') is None\n"
        "try:\n    ext.deform_conv_forward(1)\nexcept NotImplementedError as error:\n    print(error)\n"
        "print(mmvssm.compat.summary())\n",
        tmp_path,
    )
    assert "deform_conv_forward needs compiled mmcv operators (mmcv has no compiled operators)" in out
    assert "mmcv operators (mmcv has no compiled operators; nms and roi_align come from" in out


@pytest.mark.parametrize("kind", ["python", "foreign binary"])
def test_compiled_module_that_does_not_load_counts_as_absent(tmp_path, kind):
    write_package(tmp_path, {"mmcv/__init__.py": "", **NO_TORCHVISION})
    if kind == "python":
        (tmp_path / "mmcv/_ext.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    else:
        (tmp_path / f"mmcv/_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    out = run_python(
        f"import torch, mmvssm, mmcv._ext as ext\n{CALLS}\n"
        "assert call(torch.bfloat16)[0].item() == 1\n"
        "print(type(ext).__name__, mmvssm.compat.summary())\n",
        tmp_path,
    )
    assert "the compiled operators of mmcv do not load" in out  # the notice
    assert "StandIn" in out
    assert "mmcv operators (the compiled mmcv operators do not load" in out


@pytest.mark.parametrize("order", ["mmvssm, mmcv._ext", "mmcv._ext, mmvssm"])
def test_compiled_module_is_used_and_takes_bfloat16_and_strides(tmp_path, order):
    write_package(tmp_path, {"mmcv/__init__.py": "", "mmcv/_ext.py": COMPILED})
    out = run_python(
        f"import torch, {order}\nimport mmcv._ext as ext\n{CALLS}\n"
        "assert ext.deform_conv_forward() == 'compiled'\n"
        "assert type(ext.__loader__).__module__.startswith(('importlib', '_frozen')), ext.__loader__\n"
        "for dtype in torch.float32, torch.bfloat16, torch.float16:\n"
        "    out, grad, kept = call(dtype)\n"
        "    assert out.dtype == grad.dtype == dtype and out.item() == grad[0, 0, 0, 0] == 8 and len(kept) == 1\n"
        "try:\n    call(torch.bfloat16, pool_mode=0)\nexcept NotImplementedError as error:\n    print(error)\n"
        "print(mmvssm.compat.summary())\n",
        tmp_path,
    )
    assert "pool_mode='max' does not work in torch.bfloat16" in out
    assert "bfloat16 operators" in out
    assert "strided operators" in out
    assert "mmcv operators" not in out


def test_errors_of_a_compiled_module_other_than_imports_are_not_hidden(tmp_path):
    write_package(tmp_path, {"mmcv/__init__.py": "", "mmcv/_ext.py": "raise RuntimeError('broken inside')"})
    out = run_python(
        "import mmvssm\ntry:\n    import mmcv._ext\nexcept RuntimeError as error:\n    print('raised', error)\n",
        tmp_path,
    )
    assert "raised broken inside" in out


def pooled_by(ext, x, rois, output_size=(3, 2), **options):
    """Forward and backward as mmcv calls them."""
    settings = {"spatial_scale": 0.25, "sampling_ratio": 0, "pool_mode": 1, "aligned": True, **options}
    settings |= {"aligned_height": output_size[0], "aligned_width": output_size[1]}
    none = x.new_zeros(0)
    out = x.new_zeros(len(rois), x.shape[1], *output_size)
    ext.roi_align_forward(x, rois, out, none, none, **settings)
    grad = torch.zeros_like(x)
    ext.roi_align_backward(torch.ones_like(out), rois, none, none, grad, **settings)
    return out, grad


def some_input(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 30, 40, generator=generator)
    corner = torch.rand(50, 2, generator=generator) * 120 - 10
    size = torch.rand(50, 2, generator=generator) * 80
    image = torch.arange(50)[:, None] % 2
    rois = torch.cat([image, corner, corner + size], 1)
    return x.to(device, dtype), rois.to(device, dtype), torch.randperm(50, generator=generator).to(device, dtype) / 50


@pytest.fixture(params=["plain torch", "torchvision"])
def stand_in(request, monkeypatch):
    """The stand-in with either of its sources."""
    if request.param == "torchvision" and mmcv_ext.stand_in_source() != "torchvision":
        pytest.skip("the compiled part of this torchvision does not load beside this torch")
    monkeypatch.setattr(mmcv_ext, "stand_in_source", lambda: request.param)
    return mmcv_ext.StandIn("test")


def compare_with_plain(stand_in, device):
    x, rois, scores = some_input(device)
    out, grad = pooled_by(stand_in, x, rois)
    torch.testing.assert_close(out, plain_roi_align(x, rois, (3, 2), 0.25), rtol=1e-5, atol=1e-5)
    expected = plain_roi_align_backward(torch.ones_like(out), rois, tuple(x.shape), 0.25)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    for offset in (0, 1):
        kept = stand_in.nms(rois[:, 1:], scores, iou_threshold=0.3, offset=offset)
        assert kept.tolist() == plain_nms(rois[:, 1:], scores, 0.3, offset).tolist()
        assert 0 < len(kept) < 50
    narrow, narrow_grad = pooled_by(stand_in, x.bfloat16(), rois.bfloat16())
    assert narrow.dtype == narrow_grad.dtype == torch.bfloat16
    wide, _ = pooled_by(stand_in, x.bfloat16().float(), rois.bfloat16().float())
    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0)
    stand_in.nms(rois[:, 1:].bfloat16(), scores.bfloat16(), iou_threshold=0.3, offset=0)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        pooled_by(stand_in, x, rois, pool_mode=0)


def test_stand_in_on_cpu(stand_in):
    compare_with_plain(stand_in, "cpu")


@pytest.mark.gpu
def test_stand_in_on_gpu(stand_in):
    compare_with_plain(stand_in, "cuda")


@pytest.mark.gpu
def test_compiled_operators_on_gpu():
    """Where mmcv has compiled operators, they, widened, and the plain ones agree."""
    ext = pytest.importorskip("mmcv._ext")
    if isinstance(ext, mmcv_ext.StandIn):
        pytest.skip("this mmcv has no compiled operators")
    compare_with_plain_compiled(ext)


def compare_with_plain_compiled(ext):
    x, rois, scores = some_input("cuda")
    out, grad = pooled_by(ext, x, rois)
    torch.testing.assert_close(out, plain_roi_align(x, rois, (3, 2), 0.25), rtol=1e-5, atol=1e-5)
    expected = plain_roi_align_backward(torch.ones_like(out), rois, tuple(x.shape), 0.25)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    strided, strided_grad = pooled_by(ext, x.contiguous(memory_format=torch.channels_last), rois)
    assert strided_grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(strided, out, rtol=0, atol=0)
    torch.testing.assert_close(strided_grad, grad, rtol=1e-5, atol=1e-5)
    kept = ext.nms(rois[:, 1:], scores, iou_threshold=0.3, offset=0)
    assert kept.tolist() == plain_nms(rois[:, 1:], scores, 0.3).tolist()
    narrow, _ = pooled_by(ext, x.bfloat16(), rois.bfloat16())
    torch.testing.assert_close(narrow, pooled_by(ext, x.bfloat16().float(), rois.bfloat16().float())[0].bfloat16())


def test_through_mmcv():
    """mmcv's own functions on top of whatever ``mmcv._ext`` this environment has."""
    ops = pytest.importorskip("mmcv.ops", reason="needs the extra 'openmmlab'")
    x, rois, scores = some_input()
    x.requires_grad_()
    pooled = ops.RoIAlign((3, 2), 0.25, 0)(x, rois)
    torch.testing.assert_close(pooled, plain_roi_align(x, rois, (3, 2), 0.25), rtol=1e-5, atol=1e-5)
    pooled.sum().backward()
    expected = plain_roi_align_backward(torch.ones_like(pooled), rois, tuple(x.shape), 0.25)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.RoIAlign((3, 2), 0.25, 0)(x.bfloat16(), rois.bfloat16()).dtype == torch.bfloat16
    boxes = rois[:, 1:].contiguous()
    labels = torch.arange(50) % 3
    dets, kept = ops.batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.3})
    apart = boxes + labels[:, None] * 1000.0
    assert kept.tolist() == plain_nms(apart, scores, 0.3).tolist()
    assert dets.shape == (len(kept), 5)
