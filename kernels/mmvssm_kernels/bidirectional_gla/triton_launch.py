"""Shapes, strides and block sizes for launching the kernels of bidirectional gated linear attention."""

import torch
import triton
from torch import Tensor

# Tokens of a block, a power of two of at least 16.
_BLOCK = 32
# A sequence of up to so many blocks is one chunk, inside which every block meets every other; longer ones are cut into
# chunks of about _CHUNK blocks, between which states travel. At most _MOST, a power of two.
_MOST, _CHUNK = 8, 4
# Powers of two by which operands of 16 and of 32 bits may grow inside a block; more makes its gates strong.
_MILD = {2: 12.0, 4: 40.0}
# Chunks that the scan over chunks takes at once, and elements of a state that one of its programs scans.
_GROUP, _SCAN_BLOCK = 32, 64
# Warps of the kernels' programs, twice as many for float32 operands; stages of the loads in loops of the others.
_WARPS = {"prepare": 2, "states": 4, "outputs": 2, "gradients": 2}
_STAGES = 3


def columns_adjacent(tensor: Tensor) -> Tensor:
    """``tensor``, copied only if the elements of its last axis are not adjacent in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class Launch:
    """Sizes and the operands that all blocks exchange, for a forward or, with ``upstream``, a backward pass.

    ``upstream`` are the output's gradient and, if there is a norm, the normalised output, 1 / RMS and the weight.

    Attributes:
        decayed: Operands (4, rows, blocks, T, K): queries and keys of the forward, then of the backward direction.
        exponents: Per direction the total log-decay of a block and the exponents of keys and of queries
            (2, 3, rows, blocks, K).
        units: Exponents of the units of keys, of queries, including those of upstream gradients, and of these (3, rows,
            blocks).
        entering: With several chunks the states that enter them (states, rows, chunks, K V): two, or with
            ``upstream`` their gradients too.
        decay: With ``upstream``, decays of queries (2, rows, blocks, T, K), whose inverses are those of keys.
        do: With ``upstream``, the gradient of the sum of both directions (rows, blocks, T, V), in units.
        dweight: Partial sums (programs, V) of the weight's gradient.
    """

    def __init__(self, q, k, v, gf, gb, gate_normalizer, upstream: tuple | None = None):
        batch, length, heads, keys = q.shape
        values = v.shape[3]
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        # In a sequence of a few tokens products with the gradient may cancel, so that its rounding would show.
        few = length <= _BLOCK
        self.dtype = torch.float32 if few else dtype
        q, k, v = (columns_adjacent(t).to(self.dtype) for t in (q, k, v))
        self.tensors = (q, k, v, columns_adjacent(gf), columns_adjacent(gb))
        self.strides = tuple(t.stride(axis) for t in self.tensors for axis in (0, 1, 2))
        self.rows = batch * heads
        self.heads, self.length = heads, length
        self.blocks = triton.cdiv(length, _BLOCK)
        chunks = 1 if self.blocks <= _MOST else triton.cdiv(self.blocks, _CHUNK)
        self.chunk = triton.cdiv(self.blocks, chunks)
        self.chunks = triton.cdiv(self.blocks, self.chunk)
        self.sizes = (self.rows, heads, length, self.chunk, self.chunks)
        self.gate_factor = 1.0 if gate_normalizer is None else 1.0 / gate_normalizer
        self.block_keys, self.block_values = (max(16, triton.next_power_of_2(size)) for size in (keys, values))
        exact = few or (dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32)
        # Three TF32 products hold 22 bits; float32 products on NVIDIA's vector units spill thousands of registers.
        precise = "ieee" if torch.version.hip else "tf32x3"
        self.constants = dict(
            K=keys,
            V=values,
            LOGITS=gate_normalizer is not None,
            T=_BLOCK,
            MOST=_MOST,
            BLOCK_K=self.block_keys,
            BLOCK_V=self.block_values,
            MILD=_MILD[self.dtype.itemsize],
            PRECISION=precise if exact else "tf32",
        )
        self._prepare(upstream)

    def options(self, kernel: str) -> dict:
        """Compiler options of a kernel."""
        warps, wide = _WARPS[kernel], self.dtype == torch.float32
        if kernel == "states" and self.block_keys > 32:
            warps = 2  # Triton 3.6 takes products of warp groups for 64 rows and 4 warps, whose results were wrong
        elif wide:
            warps *= 2
        return dict(num_warps=warps, num_stages=1 if wide else _STAGES)

    def new(self, *shape: int, dtype=torch.float32) -> Tensor:
        """Memory for a kernel to write."""
        return self.tensors[0].new_empty(shape, dtype=dtype)

    def weights(self, kinds: int) -> Tensor:
        """Scratch for the decays between each block and the others of its chunk."""
        return self.new(kinds, self.rows * self.blocks, _MOST, self.block_keys)

    def _prepare(self, upstream: tuple | None) -> None:
        from .triton_prepare import bidirectional_gla_prepare_kernel

        tile = (self.rows, self.chunks * self.chunk, _BLOCK)
        self.decayed = self.new(4, *tile, self.block_keys, dtype=self.dtype)
        self.exponents = self.new(2, 3, *tile[:2], self.block_keys)
        self.units = self.new(3, *tile[:2])
        several = self.chunks > 1
        grid, count = ((self.rows, self.chunks), self.chunk) if several else ((self.rows, self.blocks), 1)
        self.decay = self.do = self.dweight = self.entering = increments = totals = None
        strides, given = (0, 0, 0), (None,) * 4
        if upstream is not None:
            given = (*upstream, None, None, None)[:4]
            strides = upstream[0].stride()[:3]
            small = torch.float32 if self.dtype == torch.float32 else torch.float16
            self.decay = self.new(2, *tile, self.block_keys, dtype=small)
            self.do = self.new(*tile, self.block_values, dtype=self.dtype)
            if len(upstream) > 1:
                self.dweight = self.new(grid[0] * grid[1], self.constants["V"])
        if several:
            shape = (2 if upstream is None else 4, self.rows, self.chunks)
            increments = self.new(*shape, self.block_keys * self.block_values)
            totals = self.new(2, *shape[1:], self.block_keys)
        bidirectional_gla_prepare_kernel[grid](
            *self.tensors, *given, self.decayed, self.exponents, self.units, self.decay, self.do, self.dweight,
            increments, totals,
            self.heads, self.length, count, self.gate_factor, *self.strides, *strides,
            **self.constants, **self.options("states" if several else "prepare"),
        )  # fmt: skip
        if several:
            self.entering = self._scan(increments, totals)

    def _scan(self, increments: Tensor, totals: Tensor) -> Tensor:
        from .triton_prepare import bidirectional_gla_scan_kernel

        states, rows, chunks, size = increments.shape
        entering = torch.empty_like(increments)
        bidirectional_gla_scan_kernel[(rows, triton.cdiv(size, _SCAN_BLOCK), states)](
            increments, totals, entering, chunks,
            GROUP=_GROUP, BLOCK_K=self.block_keys, SIZE=size, BLOCK=min(_SCAN_BLOCK, size), num_warps=1,
        )  # fmt: skip
        return entering
