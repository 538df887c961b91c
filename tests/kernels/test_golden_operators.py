"""The operators against arrays of the published implementation (kept outside the repository)."""

import numpy as np
import pytest
import torch

from mmvssm_kernels import selective_scan, selective_scan_2d
from mmvssm_kernels.selective_scan_2d.reference import cross_merge, cross_scan

from ..helpers import shared_dir


def load(name):
    arrays = np.load(shared_dir("golden", "vmamba", name))
    cases = sorted({key.split("/")[0] for key in arrays.files if "/" in key})
    assert cases
    for case in cases:
        yield case, {key.split("/", 1)[1]: arrays[key] for key in arrays.files if key.startswith(case + "/")}


def close(got, want, limit=1e-5):
    want = torch.as_tensor(want)
    assert got.shape == want.shape
    error = (got.detach() - want).abs().max() / want.abs().max().clamp_min(1e-30)
    assert error < limit, float(error)


def leaf(array):
    return torch.from_numpy(array.astype(np.float32)).requires_grad_()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_selective_scan(backend):
    for _, arrays in load("op_selective_scan.npz"):
        if backend == "reference" and arrays["u"].shape[2] > 200:
            continue  # thousands of recorded steps; the torch backend covers the long case
        names = [n for n in ("u", "delta", "A", "B", "C", "D", "delta_bias") if n in arrays]
        inputs = {n: leaf(arrays[n]) for n in names}
        y = selective_scan(**inputs, delta_softplus="delta_bias" in inputs, backend=backend)
        close(y, arrays["y"])
        y.backward(torch.from_numpy(arrays["dy"]).float())
        for name in names:
            close(inputs[name].grad, arrays[f"d{name}"], 1e-4)


def test_cross_scan():
    for _, arrays in load("op_cross_scan.npz"):
        x = leaf(arrays["x"])
        xs = cross_scan(x)
        close(xs, arrays["xs"].reshape(xs.shape))
        height, width = x.shape[2:]
        y = cross_merge(torch.from_numpy(arrays["ys"]).float().view(xs.shape), height, width)
        close(y, arrays["y"].reshape(y.shape))
        xs.backward(torch.from_numpy(arrays["dxs"]).float().view(xs.shape))
        close(x.grad, arrays["dx"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_ss2d(backend):
    for _, arrays in load("op_ss2d.npz"):
        x = leaf(arrays["x"])
        names = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
        weights = [leaf(arrays[n]) for n in names]
        y = selective_scan_2d(x, *weights, backend=backend)
        close(y, arrays["y"].reshape(y.shape))
        y.backward(torch.from_numpy(arrays["dy"]).float().view(y.shape))
        for name, tensor in zip(("x", *names), (x, *weights), strict=True):
            close(tensor.grad, arrays[f"d{name}"], 1e-4)
