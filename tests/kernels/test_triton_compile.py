"""Every kernel compiles for NVIDIA Ampere and Hopper and AMD CDNA 3, without a GPU."""

import os
import subprocess
import sys

import pytest

from mmvssm_kernels.dispatch import triton_importable

from ..helpers import ROOT

KERNELS = [f"selective_scan{suffix}_{part}_kernel" for suffix in ("", "_2d") for part in ("fwd", "bwd")]
KERNELS += [f"selective_scan_2d_{part}_kernel" for part in ("states", "carry", "sum")]
_TWO_PASSES = ("causal_conv1d", "add_norm", "locality_gate", "swiglu")
KERNELS += [f"{operator}_{part}_kernel" for operator in _TWO_PASSES for part in ("fwd", "bwd")]
KERNELS += ["cast_together_kernel", "bias_activation_fwd_kernel", "bias_activation_bwd_kernel", "sum_rows_kernel"]
KERNELS += ["selective_scan_segments_kernel", "selective_scan_sums_kernel"]

KERNELS += [f"bidirectional_gla_{part}_kernel" for part in ("states", "scan", "fwd", "bwd", "weight")]
KERNELS += [f"bidirectional_selective_scan_fwd_kernel_{part}" for part in ("prepare", "project", "scan")]
KERNELS += ["bidirectional_selective_scan_kernel_carry"]
_PARTS = ("again", "scan", "sum", "project", "convolve", "finish")
KERNELS += [f"bidirectional_selective_scan_bwd_kernel_{part}" for part in _PARTS]


@pytest.mark.skipif(not triton_importable(), reason="Triton has no wheels for this platform")
@pytest.mark.parametrize("target", ["cuda:80 float32", "cuda:90 float16", "hip:gfx942 bfloat16"])
def test_compile(target, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", *target.split()]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    shared = {}
    for line in done.stdout.splitlines():
        name, *_, uneven, last = line.split()
        # Lanes may not write different copies of a sum.
        assert uneven == "uneven=0", line
        shared[name] = max(shared.get(name, 0), int(last.removeprefix("shared=")))
    assert set(shared) == set(KERNELS)
    assert max(shared.values()) <= 64 * 1024  # what every one of these GPUs has
