"""Compile every kernel as it is launched for real shapes, for GPUs that need not be there.

    python -m tests.kernels.compile_kernels cuda:90 float16 float32

Launches are recorded instead of run, so block sizes, dtypes and warps are the real ones. Prints one line per binary.
"""

import re
import sys
from importlib import import_module

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from mmvssm_kernels.testing import (
    AddNorm,
    BiasActivation,
    BidirectionalGla,
    BidirectionalScan,
    Conv1d,
    Gate,
    Scan,
    Scan2d,
    SwiGlu,
)

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
SCANS = [
    Scan(1, 40, 2000, 1),
    Scan(1, 33, 70, 16, groups=3, gate=True, reverse=True),
    Scan(2, 32, 17, 5, skip=False, bias=False),
]
SCANS_2D = [Scan2d(2, 96, 56, 56, 6, 1), Scan2d(2, 768, 7, 7, 48, 1), Scan2d(1, 192, 56, 56, 6, 16)]

CONVOLUTIONS = [Conv1d(2, 160, 40), Conv1d(1, 33, 20, 3, bias=False, activation=None, padding="same")]
NORMS = [
    AddNorm(2, 40, 192),
    AddNorm(2, 9, 1000, "layer", bias=True),
    AddNorm(2, 9, 384, residual=False),
    AddNorm(2, 40, 96, "layer", bias=True, alone=True),
]
GATES = [Gate(2, 40, 3, 64, silu=True, bias=True), Gate(2, 9, 12, 32), Gate(1, 5, 3, 20)]
BIASES = [
    BiasActivation(2, 40, 80, "gelu_tanh"),
    BiasActivation(2, 40, 512, residual=True),
    BiasActivation(1, 9, 33, "relu"),
]
# A sequence of a few blocks and one of many.
ATTENTIONS = [BidirectionalGla(1, 196, 3, 32, 64, norm=True), BidirectionalGla(1, 600, 1, 16, 32)]
# Both directions of a sequence that is cut into segments, and one direction of a short one.
BIDIRECTIONAL_SCANS = [BidirectionalScan(1, 384, 130, 12, 16), BidirectionalScan(1, 40, 20, 48, 5, 3, directions=1)]
SWIGLUS = [SwiGlu(2, 40, 512), SwiGlu(1, 9, 88)]


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
            borders = import_module(f"{package}.op").kept_states(inputs[0], inputs[2], True)
            y, last = forward.selective_scan_forward(*inputs, *tail, dtype, borders)
            backward.selective_scan_backward(y, last, *inputs, *tail, borders)
        forward, backward = (import_module(f"{package}_2d.triton_{part}") for part in ("fwd", "bwd"))
        for case in SCANS_2D:
            inputs = case.inputs(dtype)
            y, entering = forward.selective_scan_2d_forward(*inputs, torch.float32)
            backward.selective_scan_2d_backward(y, entering, *inputs)
        package = "mmvssm_kernels.causal_conv1d"
        forward, backward = (import_module(f"{package}.triton_{part}") for part in ("fwd", "bwd"))
        for case in CONVOLUTIONS:
            inputs, tail = case.inputs(dtype), case.options().values()
            y = forward.causal_conv1d_forward(*inputs, *tail, dtype)
            backward.causal_conv1d_backward(y, *inputs, *tail)
        package = "mmvssm_kernels.add_norm"
        forward, backward = (import_module(f"{package}.triton_{part}") for part in ("fwd", "bwd"))
        for case in NORMS:
            x, residual, weight, bias = case.inputs(dtype)
            scale = None if bias is None or case.alone else torch.ones(case.batch)
            x = x.float() if case.alone else x  # as behind the scan of VMamba
            residual_dtype = None if case.alone else torch.float32
            arguments = (x, residual, weight, bias, 1e-5, case.norm, scale, residual_dtype, dtype)
            y, r = forward.add_norm_forward(*arguments)
            r = x if case.alone else r
            in_dtype = None if residual is None else torch.float32
            backward.add_norm_backward(y, r, r, weight, bias, 1e-5, case.norm, scale, x.dtype, in_dtype)
        package = "mmvssm_kernels.locality_gate"
        forward, backward = (import_module(f"{package}.triton_{part}") for part in ("fwd", "bwd"))
        for case in GATES:
            inputs = case.inputs(dtype)
            y = forward.locality_gate_forward(*inputs, 1e-6, case.silu)
            backward.locality_gate_backward(y, *inputs, 1e-6, case.silu)
        package = "mmvssm_kernels.swiglu"
        forward, backward = (import_module(f"{package}.triton_{part}") for part in ("fwd", "bwd"))
        for case in SWIGLUS:
            (x,) = case.inputs(dtype)
            backward.swiglu_backward(forward.swiglu_forward(x), x)
        package = "mmvssm_kernels.bias_activation"
        forward, backward = (import_module(f"{package}.triton_{part}") for part in ("fwd", "bwd"))
        for case in BIASES:
            x, bias, residual = case.inputs(dtype)
            y = forward.bias_activation_forward(x, bias, case.activation, residual)
            backward.bias_activation_backward(y, x, bias, case.activation)
        forward = import_module("mmvssm_kernels.cast_together.triton_fwd")
        weights = [torch.empty(192, 384), torch.empty(192)]
        forward.cast_together_forward(weights, torch.empty(194 * 2048, dtype=dtype))
        package = "mmvssm_kernels.bidirectional_gla"
        forward, backward = (import_module(f"{package}.triton_{part}") for part in ("fwd", "bwd"))
        for case in ATTENTIONS:
            *inputs, weight = case.inputs(dtype) if case.norm else [*case.inputs(dtype), None]
            y, normed, rstd = forward.bidirectional_gla_forward(*inputs, weight, 0.2, 16.0, 1e-6, dtype, case.norm)
            backward.bidirectional_gla_backward(y, *inputs, weight, normed, rstd, 0.2, 16.0)
        package = "mmvssm_kernels.bidirectional_selective_scan"
        forward, backward = (import_module(f"{package}.triton_{part}") for part in ("fwd", "bwd"))
        for case in BIDIRECTIONAL_SCANS:
            xz, *parameters = case.inputs(dtype)
            kept = import_module(f"{package}.op").kept_tensors(xz, parameters, True)
            y = forward.bidirectional_forward(xz, parameters, case.scale, dtype, *kept)
            backward.bidirectional_backward(y, xz, parameters, case.scale, *kept)
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
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    # The just-in-time compiler refuses what it does not know; compiling ahead of time ignores it.
    assert set(options) <= {"num_warps", "num_stages", "maxnreg"}, (kernel.__name__, options)
    assert len(args) + len(kwargs) - len(options) == len(kernel.arg_names), kernel.__name__
    return ASTSource(kernel, signature, constants, attributes), options


def uneven_sums(ptx: str) -> int:
    """Additions in which a lane's own product is not rounded, but the one that a butterfly brings to it is.

    Lanes that hold copies of such a sum hold different last bits; see :func:`mmvssm_kernels.triton_scan.rounded`.
    Counted is what LLVM has fused and what it has left for NVIDIA's assembler to fuse.
    """
    moved = dict(re.findall(r"\bmov\.b32\s+(%\w+), (%\w+);", ptx))
    brought = set(re.findall(r"\bshfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    products = set(re.findall(r"\bmul(?:\.ftz)?\.f32\s+(%\w+)", ptx))
    fused = re.findall(r"\bfma\.rn(?:\.ftz)?\.f32\s+%\w+, \S+, \S+, (%\w+);", ptx)
    added = re.findall(r"\badd(?:\.ftz)?\.f32\s+%\w+, (%\w+), (%\w+);", ptx)
    uneven = sum(moved.get(addend, addend) in brought for addend in fused)
    return uneven + sum(moved.get(b, b) in brought and a in products for pair in added for a, b in (pair, pair[::-1]))


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
            compiled = compile(source, target=gpu, options=options)
            size = f"N={kwargs.get('N', '-')} warps={options['num_warps']}"
            uneven = uneven_sums(compiled.asm.get("ptx", ""))
            print(f"{kernel.__name__} {target} {dtype} {size} uneven={uneven} shared={compiled.metadata.shared}")


if __name__ == "__main__":
    main(*sys.argv[1:])
