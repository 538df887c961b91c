"""Time the operators on a GPU beside the floor of the hardware.

    python kernels/benchmarks/run.py [--json FILE] [--dtype float16|bfloat16|float32] [--only SUBSTRING]

Every case is checked against the float64 recurrence first (on a cut-down batch); a case that fails is not timed. Times
are medians of CUDA-event timings with a flushed L2 cache (triton.testing.do_bench), in milliseconds.
"""

import argparse
import json
import platform
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from mmvssm_kernels import causal_conv1d, locality_gate, selective_scan_2d, swiglu
from mmvssm_kernels.testing import (
    AddNorm,
    BidirectionalGla,
    BidirectionalScan,
    Conv1d,
    Gate,
    Scan2d,
    SwiGlu,
    add_norm_with_drop,
    bidirectional_gla_of_list,
    bidirectional_scan_of_list,
    check_operator,
)

# Measured rates of one H200: bytes of a device copy, exponentials and multiply-adds per second.
BYTES, EXPONENTIALS, MULTIPLY_ADDS = 4.27e12, 4.18e12, 32.1e12

OPERATORS = {
    Scan2d: selective_scan_2d,
    Conv1d: causal_conv1d,
    AddNorm: add_norm_with_drop,
    Gate: locality_gate,
    SwiGlu: swiglu,
    BidirectionalGla: bidirectional_gla_of_list,
    BidirectionalScan: bidirectional_scan_of_list,
}

CASES = {
    "224 b128 stage 1": Scan2d(128, 96, 56, 56, 6, 1),
    "224 b128 stage 2": Scan2d(128, 192, 28, 28, 12, 1),
    "224 b128 stage 3": Scan2d(128, 384, 14, 14, 24, 1),
    "224 b128 stage 4": Scan2d(128, 768, 7, 7, 48, 1),
    "512x2048 b2 stage 1": Scan2d(2, 96, 128, 512, 6, 1),
    "800x1216 b2 stage 1": Scan2d(2, 96, 200, 304, 6, 1),
    "800x1216 b2 stage 3": Scan2d(2, 384, 50, 76, 24, 1),
    "v0 b128 56x56": Scan2d(128, 192, 56, 56, 6, 16),
    "v0 b128 14x14": Scan2d(128, 768, 14, 14, 24, 16),
    "block vim-tiny b128": BidirectionalScan(128, 384, 197, 12, 16),
    "block vim-small b128": BidirectionalScan(128, 768, 197, 24, 16),
    "block vim-tiny L4097 b4": BidirectionalScan(4, 384, 4097, 12, 16),
    "block vim-tiny L16129 b2": BidirectionalScan(2, 384, 16129, 12, 16),
    "conv vim-tiny b128": Conv1d(128, 384, 197),
    "conv vim-small b128": Conv1d(128, 768, 197, reverse=True),
    "conv vim-tiny L4096 b4": Conv1d(4, 384, 4096),
    "conv mambavision b128": Conv1d(128, 160, 196, 3, bias=False, padding="same"),
    "norm vim-tiny b128": AddNorm(128, 197, 192),
    "norm vim-small b128": AddNorm(128, 197, 384),
    "norm vim-base b128": AddNorm(128, 197, 768, drop=True),
    "gate vig-tiny b128": Gate(128, 196, 3, 64, silu=True, bias=True),
    "gate vigh-tiny b128 56x56": Gate(128, 3136, 3, 32, bias=True),
    "swiglu vig-tiny b128": SwiGlu(128, 196, 512),
    "swiglu vigh-base b128": SwiGlu(128, 3136, 352),
    "gla vig-tiny b128": BidirectionalGla(128, 196, 3, 32, 64),
    "gla+norm vig-tiny b128": BidirectionalGla(128, 196, 3, 32, 64, norm=True),
    "gla+norm vig-small b128": BidirectionalGla(128, 196, 6, 32, 64, norm=True),
    "gla vigh-tiny stage 1": BidirectionalGla(128, 3136, 3, 16, 32),
    "gla vigh-tiny stage 3": BidirectionalGla(128, 196, 12, 16, 32),
    "gla vig-tiny L4096 b4": BidirectionalGla(4, 4096, 3, 32, 64),
    "gla vigh-tiny 67200 b1": BidirectionalGla(1, 67200, 3, 16, 32),
}


def floors(case: NamedTuple, itemsize: int) -> tuple[float, float]:
    """Least milliseconds of forward and backward: the largest of bytes, exponentials and multiply-adds."""
    if isinstance(case, BidirectionalScan):
        tokens = case.batch * case.length
        projected = case.rank + 2 * case.state
        elements = case.directions * tokens * case.channels
        forward = (
            itemsize * tokens * (5 * case.channels + 3 * projected) / BYTES,
            elements * (case.state + 5) / EXPONENTIALS,
            elements * (case.width + case.rank + 4 * case.state + 3) / MULTIPLY_ADDS,
        )
        backward = (
            itemsize * tokens * (8 * case.channels + 5 * projected) / BYTES,
            elements * (case.state + 7.5) / EXPONENTIALS,
            elements * (case.width + 2 * case.rank + 11 * case.state + 8) / MULTIPLY_ADDS,
        )
        return 1e3 * max(forward), 1e3 * max(backward)
    if isinstance(case, Conv1d):  # x in and y out; x and dy in and dx out
        elements = case.batch * case.channels * case.length
        return 1e3 * 2 * itemsize * elements / BYTES, 1e3 * 3 * itemsize * elements / BYTES
    if isinstance(case, AddNorm):  # a float32 residual stream in and out; two float32 gradients of it and the stream in
        elements = case.batch * case.channels * case.length
        return 1e3 * (2 * itemsize + 8) * elements / BYTES, 1e3 * (2 * itemsize + 12) * elements / BYTES
    if isinstance(case, Gate):  # three tensors in and one out; four in and three out
        elements = case.batch * case.length * case.heads * case.values
        return 1e3 * 4 * itemsize * elements / BYTES, 1e3 * 7 * itemsize * elements / BYTES
    if isinstance(case, SwiGlu):  # both halves in and one out; three in and two out
        elements = case.batch * case.length * case.hidden
        return 1e3 * 3 * itemsize * elements / BYTES, 1e3 * 5 * itemsize * elements / BYTES
    if isinstance(case, BidirectionalGla):  # q, k and gates in, v in, output out; all but the output in and out
        tokens = case.batch * case.length * case.heads
        forward = 2 * case.keys + case.values
        return (
            1e3 * tokens * max(2 * itemsize * forward / BYTES, 8 * case.keys / EXPONENTIALS),
            1e3 * tokens * max(itemsize * (4 * forward - case.values) / BYTES, 8 * case.keys / EXPONENTIALS),
        )
    tokens = case.batch * case.height * case.width
    projected = 4 * (case.rank + 2 * case.state)
    elements = 4 * tokens * case.channels
    forward = (
        itemsize * tokens * (3 * case.channels + 2 * projected) / BYTES,
        elements * (case.state + 2) / EXPONENTIALS,
        elements * (case.rank + 4 * case.state + 3) / MULTIPLY_ADDS,
    )
    backward = (
        itemsize * tokens * (5 * case.channels + 6 * projected) / BYTES,
        elements * (case.state + 3) / EXPONENTIALS,
        elements * (2 * case.rank + 11 * case.state + 8) / MULTIPLY_ADDS,
    )
    return 1e3 * max(forward), 1e3 * max(backward)


def measure(case: NamedTuple, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward milliseconds, and MiB held between them."""
    from triton.testing import do_bench

    operator, options = OPERATORS[type(case)], case.options()
    check_operator(operator, case._replace(batch=1), dtype, "cuda", "triton")
    inputs = case.inputs(dtype, "cuda")
    with torch.no_grad():
        forward = do_bench(lambda: operator(*inputs, **options), return_mode="median")
    inputs = [None if t is None else t.requires_grad_() for t in inputs]
    leaves = [t for t in inputs if t is not None]
    before = torch.cuda.memory_allocated()
    results = operator(*inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    # Results belong to the consumer and x to the producer; whichever the backward pass needs is counted.
    needed = results[1] if isinstance(case, AddNorm) else inputs[0]
    held = torch.cuda.memory_allocated() - before + needed.numel() * needed.element_size()
    held -= sum(t.numel() * t.element_size() for t in results)
    upstream = [torch.randn_like(t) for t in results]
    backward = do_bench(lambda: torch.autograd.grad(results, leaves, upstream, retain_graph=True), return_mode="median")
    floor_forward, floor_backward = floors(case, inputs[0].element_size())
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_floor_ms": floor_forward,
        "backward_floor_ms": floor_backward,
        "held_mib": held / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    import triton

    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{machine}, Python {platform.python_version()}, {args.dtype}")
    print(f"{'case':24}{'fwd ms':>9}{'/ floor':>9}{'bwd ms':>9}{'/ floor':>9}{'held MiB':>10}")
    results, failed = {}, False
    for name, case in CASES.items():
        if args.only not in name:
            continue
        try:
            row = results[name] = measure(case, getattr(torch, args.dtype))
        except Exception:  # one broken case must not hide the others
            failed = True
            print(f"{name:24} not timed: its check failed")
            traceback.print_exc(limit=2)
            continue
        forward, backward = row["forward_ms"], row["backward_ms"]
        print(
            f"{name:24}{forward:9.3f}{forward / row['forward_floor_ms']:9.1f}{backward:9.3f}"
            f"{backward / row['backward_floor_ms']:9.1f}{row['held_mib']:10.1f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "dtype": args.dtype, "results": results}, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
