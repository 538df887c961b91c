"""Compile every kernel as it is launched for real shapes, for GPUs that need not be there.

    python -m tests.kernels.compile_kernels cuda:90 float16 float32

Launches are recorded instead of run, so block sizes, dtypes and warps are the real ones. Prints one line per binary.
"""

import sys
from importlib import import_module

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from mmvssm_kernels.testing import Scan, Scan2d

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# More states compile too, but 64 keep ptxas busy for three minutes (kernels/NOTES.md).
SCANS = [
    Scan(1, 40, 2000, 1),
    Scan(1, 33, 70, 16, groups=3, gate=True, reverse=True),
    Scan(2, 32, 17, 5, skip=False, bias=False),
]
SCANS_2D = [Scan2d(2, 96, 56, 56, 6, 1), Scan2d(2, 768, 7, 7, 48, 1), Scan2d(1, 192, 56, 56, 6, 16)]


def record_launches(dtype: torch.dtype) -> list:
    """(kernel, positional, keyword arguments) of all launches of all operators."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    run, JITFunction.run = JITFunction.run, record
    try:
        package = "mmvssm_kernels.selective_scan"
        forward, backward = (import_module(f"{package}.triton_{part}") for part in ("fwd", "bwd"))
        for case in SCANS:
            inputs = case.inputs(dtype)
            tail = (case.softplus, case.reverse)
            y, last = forward.selective_scan_forward(*inputs, *tail)
            backward.selective_scan_backward(y, last, *inputs, *tail)
        forward, backward = (import_module(f"{package}_2d.triton_{part}") for part in ("fwd", "bwd"))
        for case in SCANS_2D:
            inputs = case.inputs(dtype)
            y = forward.selective_scan_2d_forward(*inputs, torch.float32)
            backward.selective_scan_2d_backward(y, *inputs)
    finally:
        JITFunction.run = run
    return launches


def source_of(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """What the just-in-time compiler would compile for a launch, and its options."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = kwargs.get(parameter.name, args[i] if i < len(args) else None)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    return ASTSource(kernel, signature, constants, attributes), options


def main(target: str, *dtypes: str) -> None:
    backend, architecture = target.split(":")
    number = int(architecture) if architecture.isdigit() else architecture
    gpu = GPUTarget(backend, number, 64 if backend == "hip" else 32)
    seen = set()
    for dtype in (getattr(torch, name) for name in dtypes):
        for kernel, args, kwargs in record_launches(dtype):
            source, options = source_of(kernel, args, kwargs)
            key = (kernel.__name__, str(source.signature), str(source.constants), str(options))
            if key in seen:
                continue
            seen.add(key)
            shared = compile(source, target=gpu, options=options).metadata.shared
            print(f"{kernel.__name__} {target} {dtype} N={kwargs['N']} warps={options['num_warps']} shared={shared}")


if __name__ == "__main__":
    main(*sys.argv[1:])
