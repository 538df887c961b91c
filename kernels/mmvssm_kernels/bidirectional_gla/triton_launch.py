"""Shapes, strides and block sizes for launching the kernels of bidirectional gated linear attention."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# With so many heads in a batch each gets one program; fewer are cut into segments, to about so many programs.
_ENOUGH_ROWS, _TARGET_PROGRAMS = 264, 792
# Tokens of a chunk, a power of two of at least 16, and warps of a program. Two warps hold the 2 x 16 rows that the
# tensor cores' instructions want; more would do work twice.
_CHUNK, _WARPS = 32, 2
# Segments that the scan over segments takes at once, and elements of a state that one of its programs scans.
_GROUP, _SCAN_BLOCK = 16, 128
# Operands of products that were computed in float32: float16 has not the range to hold them, TF32 has its precision.
_WIDE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float32, torch.float32: tl.float32}


def columns_adjacent(tensor: Tensor) -> Tensor:
    """``tensor``, copied only if the elements of its last axis are not adjacent in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class Launch:
    """Everything that forward and backward launches have in common."""

    def __init__(self, q, k, v, gf, gb, gate_normalizer):
        batch, length, heads, keys = q.shape
        values = v.shape[3]
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = (columns_adjacent(t).to(dtype) for t in (q, k, v))
        self.tensors = (q, k, v, columns_adjacent(gf), columns_adjacent(gb))
        self.strides = tuple(t.stride(axis) for t in self.tensors for axis in (0, 1, 2))
        self.rows = batch * heads
        chunks = triton.cdiv(length, _CHUNK)
        segments = 1 if self.rows >= _ENOUGH_ROWS else min(chunks, triton.cdiv(_TARGET_PROGRAMS, self.rows))
        self.chunks_per_segment = triton.cdiv(chunks, segments)
        self.segments = triton.cdiv(chunks, self.chunks_per_segment)
        self.grid = (self.rows, self.segments)
        self.sizes = (heads, length, self.chunks_per_segment, self.segments)
        self.gate_factor = 1.0 if gate_normalizer is None else 1.0 / gate_normalizer
        self.block_keys, self.block_values = (max(16, triton.next_power_of_2(size)) for size in (keys, values))
        exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        # Three TF32 products hold 22 bits; float32 products on NVIDIA's vector units spill thousands of registers.
        precise = "ieee" if torch.version.hip else "tf32x3"
        self.constants = dict(
            K=keys,
            V=values,
            LOGITS=gate_normalizer is not None,
            T=_CHUNK,
            BLOCK_K=self.block_keys,
            BLOCK_V=self.block_values,
            WIDE=_WIDE[dtype],
            PRECISION=precise if exact else "tf32",
            # float32 operands need twice the registers and shared memory.
            num_warps=2 * _WARPS if exact else _WARPS,
            num_stages=1 if exact else 2,
        )

    def new_borders(self) -> Tensor:
        """Room for a state at every chunk."""
        chunks = self.segments * self.chunks_per_segment
        return self._new(self.rows, chunks, self.block_keys * self.block_values)

    def entering_states(self, dout=None, normed=None, rstd=None, weight=None) -> Tensor:
        """States that enter the segments (states, rows, segments, K V): two, or with ``dout`` their gradients too."""
        from .triton_states import bidirectional_gla_scan_kernel, bidirectional_gla_summary_kernel

        states, size = 2 if dout is None else 4, self.block_keys * self.block_values
        increments = self._new(states, self.rows, self.segments, size)
        totals = self._new(states, self.rows, self.segments, self.block_keys)
        strides = (0, 0, 0) if dout is None else dout.stride()[:3]
        bidirectional_gla_summary_kernel[(self.rows, self.segments, states)](
            *self.tensors, dout, normed, rstd, weight, increments, totals,
            *self.sizes, self.gate_factor, *self.strides, *strides, **self.constants,
        )  # fmt: skip
        entering = torch.empty_like(increments)
        bidirectional_gla_scan_kernel[(self.rows, triton.cdiv(size, _SCAN_BLOCK), states)](
            increments, totals, entering, self.segments,
            GROUP=_GROUP, BLOCK_K=self.block_keys, BLOCK_V=self.block_values, BLOCK=min(_SCAN_BLOCK, size), num_warps=1,
        )  # fmt: skip
        return entering

    def _new(self, *shape: int) -> Tensor:
        return self.tensors[0].new_empty(shape, dtype=torch.float32)
