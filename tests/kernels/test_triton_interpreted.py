"""The Triton kernels in Triton's CPU interpreter, against the float64 recurrence.

The interpreter has to be chosen before Triton is imported, so the cases run in a process of their own: collected
normally, this file holds one test that starts pytest on this file again with ``TRITON_INTERPRET=1``.
"""

import os
import subprocess
import sys

import pytest
import torch

from mmvssm_kernels import selective_scan
from mmvssm_kernels.dispatch import interpreting, triton_importable
from mmvssm_kernels.testing import (
    OPERATORS,
    BidirectionalGla,
    BidirectionalScan,
    Scan,
    check_operator,
    poisoned_memory,
    relative_error,
)

from .cases import INTERPRETED, case_id, laid_out_as_in_models

pytestmark = pytest.mark.skipif(not triton_importable(), reason="Triton has no wheels for this platform")


# Small models: what is rounded on the way to their gradients shows most; from 64 channels on, Vim's block rounds more.
# The attention has decays that float16 could not hold, but whose products it can.
IN_16_BITS = [
    INTERPRETED[3],
    BidirectionalScan(2, 6, 9, 2, 4),
    BidirectionalScan(1, 64, 9, 2, 16),
    BidirectionalGla(1, 40, 1, 8, 24, decay=-1.0),
]


def correct_bfloat16(monkeypatch) -> None:
    """What Triton's interpreter (3.7) does with bfloat16, as GPUs do it.

    It multiplies the bits of operands of products as if they were integers, and cuts off float32 instead of rounding.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot
    create_fp_trunc = InterpreterBuilder.create_fp_trunc

    def create_rounding_trunc(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return create_fp_trunc(self, src, dst_type)
        rounded = torch.from_numpy(src.data.astype("float32")).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view("uint16"), tl.bfloat16)

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_wide_dot(self, a, b, *options):
        return create_dot(self, widened(a), widened(b), *options)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_wide_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_rounding_trunc)


if interpreting():

    @pytest.mark.parametrize("segments", ["one", "several"])
    @pytest.mark.parametrize("case", INTERPRETED, ids=case_id)
    def test_against_float64(case, segments, monkeypatch):
        from mmvssm_kernels.add_norm import triton_bwd as add_norm
        from mmvssm_kernels.bidirectional_gla import triton_launch as bidirectional_gla
        from mmvssm_kernels.bidirectional_selective_scan import triton_launch as bidirectional_selective_scan
        from mmvssm_kernels.causal_conv1d import triton_launch as causal_conv1d
        from mmvssm_kernels.locality_gate import triton_bwd as locality_gate
        from mmvssm_kernels.selective_scan import triton_launch
        from mmvssm_kernels.selective_scan_2d import segments as selective_scan_2d
        from mmvssm_kernels.selective_scan_2d import triton_launch as selective_scan_2d_launch

        # Smaller blocks than on a GPU: the interpreter walks through a tile element by element.
        for form in ("forward_form", "backward_form"):
            monkeypatch.setattr(triton_launch, form, lambda state: (16, 1, 4, None))
        monkeypatch.setattr(selective_scan_2d, "LANE_TOKENS", 2)
        monkeypatch.setattr(bidirectional_gla, "_SCAN_BLOCKS", 1)
        monkeypatch.setattr(selective_scan_2d_launch, "_ENOUGH_PROGRAMS", 4 if segments == "several" else 1)
        monkeypatch.setattr(selective_scan_2d_launch, "_MANY_PROGRAMS", 1)
        if segments == "several":
            monkeypatch.setattr(bidirectional_gla, "_UNSCANNED", 0)
            monkeypatch.setattr(bidirectional_gla, "_SCAN_WARPS", 2)
            monkeypatch.setattr(bidirectional_gla, "_SCAN_LONG", 1)
            monkeypatch.setattr(triton_launch, "_MIN_TOKENS_PER_SEGMENT", 1)
            monkeypatch.setattr(selective_scan_2d, "LANE_TOKENS", 1)
            monkeypatch.setattr(bidirectional_selective_scan, "_MIN_TILES_PER_SEGMENT", 1)
            monkeypatch.setattr(causal_conv1d, "_MIN_STEPS", 1)
            monkeypatch.setattr(add_norm, "_MAX_PROGRAMS", 2)
            monkeypatch.setattr(locality_gate, "_MAX_PROGRAMS", 2)
            if (case.length if hasattr(case, "length") else case.height * case.width) <= 16:
                pytest.skip("the sequence fits into one tile, so it cannot be cut")
        with poisoned_memory():
            check_operator(OPERATORS[type(case)], case, torch.float32, "cpu", "triton")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", IN_16_BITS, ids=case_id)
    def test_half_precision_inputs(case, dtype, monkeypatch):
        correct_bfloat16(monkeypatch)
        check_operator(OPERATORS[type(case)], case, dtype, "cpu", "triton")

    def test_scan_of_inputs_laid_out_as_in_models():
        case = Scan(2, 6, 11, 2, groups=2, gate=True, reverse=True)
        inputs = [t.requires_grad_() for t in laid_out_as_in_models(case.inputs(torch.float32))]
        results = []
        for backend in ("triton", "reference"):
            outputs = selective_scan(*inputs, **case.options(), backend=backend)
            torch.manual_seed(0)
            upstream = [torch.randn(t.shape) for t in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, inputs, upstream)])
        for got, want in zip(*results, strict=True):
            assert relative_error(got, want) < 1e-5

    @pytest.mark.parametrize("options", [{"norm": True}, {"decay": -1.0}], ids=str)
    def test_attention_of_scanned_states(options, monkeypatch):
        from mmvssm_kernels.bidirectional_gla import triton_launch

        # States in float16, in units of their keys.
        monkeypatch.setattr(triton_launch, "_UNSCANNED", 0)
        case = BidirectionalGla(1, 70, 1, 20, 40, **options)
        with poisoned_memory():
            check_operator(OPERATORS[type(case)], case, torch.float16, "cpu", "triton")

else:

    def test_in_the_interpreter():
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:]
        assert " passed" in done.stdout
