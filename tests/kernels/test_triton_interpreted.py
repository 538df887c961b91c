"""The Triton kernels in Triton's CPU interpreter, against the float64 recurrence.

The interpreter has to be chosen before Triton is imported, so the cases run in a process of their own: collected
normally, this file holds one test that starts pytest on this file again with ``TRITON_INTERPRET=1``.
"""

import os
import subprocess
import sys

import pytest
import torch

from mmvssm_kernels.dispatch import interpreting, triton_importable
from mmvssm_kernels.testing import check_operator, poisoned_memory

from .cases import INTERPRETED, OPERATORS, case_id

pytestmark = pytest.mark.skipif(not triton_importable(), reason="Triton has no wheels for this platform")

if interpreting():

    @pytest.mark.parametrize("segments", ["one", "several"])
    @pytest.mark.parametrize("case", INTERPRETED, ids=case_id)
    def test_against_float64(case, segments, monkeypatch):
        from mmvssm_kernels.selective_scan import triton_launch

        if segments == "several":
            monkeypatch.setattr(triton_launch, "_MIN_TILES_PER_SEGMENT", 1)
            if (case.length if hasattr(case, "length") else case.height * case.width) <= 16:
                pytest.skip("the sequence fits into one tile, so it cannot be cut")
        with poisoned_memory():
            check_operator(OPERATORS[type(case)], case, torch.float32, "cpu", "triton")

    def test_half_precision_inputs():
        check_operator(OPERATORS[type(INTERPRETED[3])], INTERPRETED[3], torch.float16, "cpu", "triton")

else:

    def test_in_the_interpreter():
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:]
        assert " passed" in done.stdout
