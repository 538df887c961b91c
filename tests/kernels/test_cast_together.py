"""Copies of several tensors in another dtype, on a CPU."""

import os
import subprocess
import sys

import pytest
import torch

from mmvssm_kernels import cast_together
from mmvssm_kernels.dispatch import triton_importable

from ..helpers import ROOT

# More than one launch takes, one element more or less than a program has, and an empty one between others.
SHAPES = [(5, 7), (2048,), (300, 17), (1,), (0, 3), (16, 1, 3, 3), (2049,), (2047,), (), (3, 5), (4096, 2)]


@pytest.mark.parametrize("count", [1, 2, 8, 9, len(SHAPES)])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16", "float32"), ("float64", "float16")], ids=str)
def test_is_a_copy_of_each(count, dtypes):
    given, wanted = (getattr(torch, name) for name in dtypes)
    tensors = [torch.randn(shape, dtype=torch.float64).to(given) for shape in SHAPES[:count]]
    for copy, tensor in zip(cast_together(tensors, wanted), tensors, strict=True):
        assert copy.is_contiguous()
        assert torch.equal(copy, tensor.to(wanted))


def test_strides_do_not_matter():
    tensors = [torch.randn(6, 8).T, torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)]
    for copy, tensor in zip(cast_together(tensors, torch.float16), tensors, strict=True):
        assert torch.equal(copy, tensor.half())


def test_opcheck():
    tensors = [torch.randn(3, 5), torch.randn(7)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.mmvssm.cast_together.default, (tensors, torch.float16, "auto"), test_utils=tests)


@pytest.mark.skipif(not triton_importable(), reason="Triton has no wheels for this platform")
def test_kernel_interpreted():
    code = (
        "import torch\nfrom mmvssm_kernels import cast_together\n"
        f"tensors = [torch.randn(shape) for shape in {SHAPES}]\n"
        "copies = cast_together(tensors, torch.float16, backend='triton')\n"
        "assert all(torch.equal(c, t.half()) for c, t in zip(copies, tensors, strict=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize(
    ("tensors", "dtype", "error", "message"),
    [
        ([], torch.float16, ValueError, "tensors must hold at least one tensor"),
        ([torch.zeros(2), 1], torch.float16, TypeError, r"tensors\[1\] must be a tensor, but it is int"),
        ([torch.zeros(2).int()], torch.float16, ValueError, r"tensors\[0\] must be float16, bfloat16"),
        ([torch.zeros(2), torch.zeros(2).half()], torch.float16, ValueError, r"tensors\[1\] must have the dtype"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], torch.float16, ValueError, r"tensors\[1\] must be on cpu"),
        ([torch.zeros(2)], torch.int8, ValueError, "dtype must be a floating dtype"),
    ],
)
def test_bad_input(tensors, dtype, error, message):
    with pytest.raises(error, match=message):
        cast_together(tensors, dtype)
