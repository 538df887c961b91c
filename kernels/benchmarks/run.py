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

import torch

from mmvssm_kernels import selective_scan_2d
from mmvssm_kernels.testing import Scan2d, check_operator

# Measured rates of one H200: bytes of a device copy, exponentials and multiply-adds per second.
BYTES, EXPONENTIALS, MULTIPLY_ADDS = 4.27e12, 4.18e12, 32.1e12

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
}


def floors(case: Scan2d, itemsize: int) -> tuple[float, float]:
    """Least milliseconds of forward and backward: the largest of bytes, exponentials and multiply-adds."""
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


def measure(case: Scan2d, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward milliseconds, and MiB held between them."""
    from triton.testing import do_bench

    check_operator(selective_scan_2d, case._replace(batch=1), dtype, "cuda", "triton")
    inputs = case.inputs(dtype, "cuda")
    with torch.no_grad():
        forward = do_bench(lambda: selective_scan_2d(*inputs), return_mode="median")
    inputs = [t.requires_grad_() for t in inputs]
    before = torch.cuda.memory_allocated()
    y = selective_scan_2d(*inputs)
    # The result itself belongs to the consumer; x is held by the producer and counted because backward needs it.
    held = (
        torch.cuda.memory_allocated()
        - before
        - y.numel() * y.element_size()
        + inputs[0].numel() * inputs[0].element_size()
    )
    dy = torch.randn_like(y)
    backward = do_bench(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True), return_mode="median")
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
