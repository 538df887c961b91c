"""Shapes, strides and block sizes for launching the kernels of bidirectional gated linear attention."""

import math

import torch
import triton
from torch import Tensor

from ..grids import cdiv

# Tokens of a block, a power of two of at least 16, in the forward and in the backward pass; of float32 and wide heads.
_BLOCK, _BACKWARD_BLOCK, _SMALL_BLOCK = 64, 32, 32
# A sequence of up to so many blocks needs no scan over blocks: each adds up what the others leave.
_UNSCANNED = 8
# Powers of two by which operands of 16 and of 32 bits may grow inside a block; more makes its gates strong.
_MILD = {2: 12.0, 4: 40.0}
# The scan over blocks: values that a program owns, and blocks that a warp takes at once. A program has _SCAN_WARPS if
# there are more blocks than _SCAN_LONG and fewer programs than _SCAN_FEW, else one.
_SCAN_VALUES, _SCAN_BLOCKS, _SCAN_WARPS, _SCAN_LONG, _SCAN_FEW = 64, 16, 8, 64, 512
# For heads of up to 16 keys and for wider ones: warps of a program, twice as many for float32 operands, and for 16-bit
# inputs the registers of a lane with which one warp more finds room, where that was faster.
_WARPS = {"states": (2, 2), "outputs": (2, 2), "gradients": (2, 4)}
_REGISTERS = {"states": (128, 168), "outputs": (128, 168), "gradients": (None, 168)}
# Neighbouring keys in a lane.
_VEC = 4
# Programs of the launch for strong gates.
_STRONG_PROGRAMS = 132


def columns_adjacent(tensor: Tensor) -> Tensor:
    """``tensor``, copied only if the elements of its last axis are not adjacent in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class Launch:
    """Sizes and states at the borders of blocks for a forward or, with ``upstream``, a backward pass.

    ``upstream`` are the output's gradient and, if there is a norm, the normalised output, 1 / RMS and the weight.

    Attributes:
        states: States (states, rows, blocks, K, V) and the exponents (states, rows, blocks, K) of their units: two, or
            with ``upstream`` their gradients too. If ``scanned`` those that enter the blocks, else what a block adds.
        totals: Total log-decays of the blocks (2, rows, blocks, K).
        strong: Whether a block's gates are strong (rows, blocks).
        do, do_units: With ``upstream``, the gradient of the sum of both directions (rows, blocks, T, V), in units, and
            their exponents (rows, blocks).
        dweight: Partial sums (programs, V) of the weight's gradient.
    """

    def __init__(self, q, k, v, gf, gb, gate_normalizer, upstream: tuple | None = None):
        batch, length, heads, keys = q.shape
        values = v.shape[3]
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        # In a sequence of a few tokens products with the gradient may cancel, so that its rounding would show.
        few = length <= _SMALL_BLOCK
        self.dtype = torch.float32 if few else dtype
        q, k, v = (columns_adjacent(t).to(self.dtype) for t in (q, k, v))
        self.tensors = (q, k, v, columns_adjacent(gf), columns_adjacent(gb))
        self.strides = tuple(t.stride(axis) for t in self.tensors for axis in (0, 1, 2))
        self.rows = batch * heads
        self.block_keys, self.block_values = (max(16, triton.next_power_of_2(size)) for size in (keys, values))
        small = self.dtype == torch.float32 or self.block_keys > 32 or self.block_values > 64
        block = _SMALL_BLOCK if small else _BLOCK if upstream is None else _BACKWARD_BLOCK
        self.blocks = cdiv(length, block)
        self.scanned = self.blocks > _UNSCANNED
        self.sizes = (self.rows, heads, length, self.blocks)
        self.gate_factor = 1.0 if gate_normalizer is None else 1.0 / gate_normalizer
        exact = few or (dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32)
        # Three TF32 products hold 22 bits; float32 products on NVIDIA's vector units spill thousands of registers.
        precise = "ieee" if torch.version.hip else "tf32x3"
        self.constants = dict(
            K=keys,
            V=values,
            LOGITS=gate_normalizer is not None,
            T=block,
            BLOCK_K=self.block_keys,
            BLOCK_V=self.block_values,
            PRECISION=precise if exact else "tf32",
        )
        self._make_states(upstream)

    def options(self, kernel: str, strong: bool = False) -> dict:
        """Compiler options of a kernel, and how its lanes share tokens and keys."""
        wide_heads, in_16_bits = self.block_keys > 16, self.dtype != torch.float32
        warps = _WARPS[kernel][wide_heads] * (1 if in_16_bits else 2)
        if kernel == "states" and self.block_keys > 32:
            # Triton 3.6 takes products of warp groups for 64 rows and 4 warps, whose results were wrong. Rows of states
            # are keys; other products have as many rows as a block has tokens, of which only two warps share 64.
            warps = 2
        parts = min(self.constants["T"], max(1, 32 * warps * _VEC // self.block_keys))
        options = dict(num_warps=warps, num_stages=1, PARTS=parts, VEC=_VEC)
        registers = _REGISTERS[kernel][wide_heads]
        if strong or (kernel == "outputs" and not self.scanned):
            registers = None  # these hold more
        if registers is not None and in_16_bits and not torch.version.hip:
            options["maxnreg"] = registers
        return options

    def grid(self, strong: bool) -> tuple[int]:
        """Programs of a launch for blocks with mild or with strong gates."""
        programs = self.rows * self.blocks
        return (min(programs, _STRONG_PROGRAMS) if strong else programs,)

    def new(self, *shape: int, dtype=torch.float32) -> Tensor:
        """Memory for a kernel to write."""
        return self.tensors[0].new_empty(shape, dtype=dtype)

    def _make_states(self, upstream: tuple | None) -> None:
        from .triton_states import bidirectional_gla_states_kernel

        shape = (2 if upstream is None else 4, self.rows, self.blocks, self.block_keys)
        wide = torch.float32 if self.dtype == torch.float32 else torch.float16
        self.states = self.new(*shape, self.block_values, dtype=wide), self.new(*shape)
        self.totals = self.new(2, *shape[1:])
        self.strong = self.new(*shape[1:3], dtype=torch.int32)
        self.do = self.do_units = self.dweight = None
        strides, given = (0, 0, 0), (None,) * 4
        if upstream is not None:
            given = (*upstream, None, None, None)[:4]
            strides = upstream[0].stride()[:3]
            self.do = self.new(*shape[1:3], self.constants["T"], self.block_values, dtype=self.dtype)
            self.do_units = self.new(*shape[1:3])
            if len(upstream) > 1:
                self.dweight = self.new(self.rows * self.blocks, self.constants["V"])
        bidirectional_gla_states_kernel[self.grid(False)](
            *self.tensors, *given, *self.states, self.totals, self.strong, self.do, self.do_units, self.dweight,
            *self.sizes[1:], self.gate_factor, *self.strides, *strides,
            **self.constants, **self.options("states"), MILD=_MILD[self.dtype.itemsize],
        )  # fmt: skip
        if self.scanned:
            self._scan()

    def _scan(self) -> None:
        from .triton_states import bidirectional_gla_scan_kernel

        entering = tuple(torch.empty_like(t) for t in self.states)
        part = min(_SCAN_VALUES, self.block_values)
        grid = (self.rows, self.block_keys * self.block_values // part, len(entering[0]))
        parts = _SCAN_WARPS if self.blocks > _SCAN_LONG and math.prod(grid) < _SCAN_FEW else 1
        bidirectional_gla_scan_kernel[grid](
            *self.states, self.totals, *entering, self.blocks,
            PARTS=parts, S=_SCAN_BLOCKS, BLOCK_K=self.block_keys, BLOCK_V=self.block_values, PART_V=part,
            num_warps=parts,
        )  # fmt: skip
        self.states = entering
