"""Choice of the backend that runs an operator.

Order of precedence: the operator's ``backend`` argument, the innermost :func:`use_backend` context, the environment
variable ``MMVSSM_BACKEND``, and last ``auto``: Triton for tensors on a GPU that Triton can serve, torch elsewhere.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .flops import register_formulas

BACKENDS = ("auto", "triton", "torch", "reference")
# Innermost last. A plain list, because torch.compile cannot trace context variables.
_contexts: list[str] = []
# Operators whose kernels could not be compiled in this process; served by torch from then on.
_broken: set[str] = set()
# What is in the way of float64 inputs, results and gradients.
FLOAT32_ONLY = "the kernels compute in float32, not float64"
# The batch is the third axis of the launch grid.
_MAX_BATCH = 65535


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(BACKENDS)}, but it is {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside the ``with`` block on backend ``name``.

    Args:
        name: ``auto``, ``triton``, ``torch`` or ``reference``.

    Raises:
        ValueError: If ``name`` is none of these.
    """
    _contexts.append(_checked(name, "use_backend(name)"))
    try:
        yield
    finally:
        _contexts.pop()


def requested_backend(argument: str) -> str:
    """Backend that the caller asked for, from argument, context or environment; ``auto`` when nobody did."""
    if not torch.compiler.is_compiling():
        register_formulas()
    if _checked(argument, "backend") != "auto":
        return argument
    if _contexts:
        return _contexts[-1]
    return _checked(os.environ.get("MMVSSM_BACKEND", "auto"), "environment variable MMVSSM_BACKEND")


def interpreting() -> bool:
    """Whether Triton runs its kernels in the CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_importable() -> bool:
    """Whether the package ``triton`` is installed."""
    return importlib.util.find_spec("triton") is not None


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """Backends that can serve tensors on ``device``, the preferred one first."""
    device = torch.device(device)
    if triton_importable() and device.type == "cuda":
        return ("triton", "torch", "reference")
    if triton_importable() and interpreting():
        return ("torch", "reference", "triton")
    return ("torch", "reference")


def _obstacle(tensor: torch.Tensor, max_batch: int | None = _MAX_BATCH) -> str | None:
    """Why the Triton kernels cannot serve this first input of an operator; None if they can."""
    if not triton_importable():
        return "Triton is not installed"
    if "triton" not in available_backends(tensor.device):
        return f"Triton cannot serve tensors on {tensor.device}"
    if tensor.dtype == torch.float64:
        return FLOAT32_ONLY
    if max_batch is not None and tensor.shape[0] > max_batch:
        return f"the kernels take batches of at most {max_batch}, not {tensor.shape[0]}"
    return None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context of every implementation: dtypes are the operator's business, autocast must not change products inside."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _current(device: torch.device) -> AbstractContextManager:
    """Context in which Triton launches on ``device``; free where it is the current one anyway."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def run(
    operator: str,
    backend: str,
    tensor: torch.Tensor,
    triton_call: Callable,
    torch_call: Callable,
    obstacle: str | None = None,
    max_batch: int | None = _MAX_BATCH,
) -> Any:
    """Call the implementation of ``operator`` that ``backend`` and the device of ``tensor``, its first input, select.

    With ``auto``, torch serves what the kernels cannot, float64 for one, and takes over, with one notice, from a kernel
    that this GPU and Triton version cannot compile. With an explicit ``triton`` both are errors. ``obstacle`` is what
    the operator itself knows to be in the way, if anything; ``max_batch`` is None where the launch grid sets no limit.
    """
    device = tensor.device
    obstacle = _obstacle(tensor, max_batch) or obstacle
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"backend 'triton' was asked for, but {obstacle}; use 'auto' or 'torch'")
    preferred = available_backends(device)[0] == "triton" and operator not in _broken
    automatic = backend == "auto" and preferred and obstacle is None
    with without_autocast(device), _current(device):
        return _run(operator, backend, device, automatic, triton_call, torch_call)


def _run(
    operator: str, backend: str, device: torch.device, automatic: bool, triton_call: Callable, torch_call: Callable
) -> Any:
    if backend != "triton" and not automatic:
        return torch_call()
    try:
        return triton_call()
    except Exception as error:
        if backend == "triton" or not _is_compile_error(error):
            raise
        _broken.add(operator)
        warnings.warn(
            f"mmvssm: the Triton kernel of {operator} does not compile on {torch.cuda.get_device_name(device)} "
            f"({type(error).__name__}: {str(error)[:200]}); the slower torch backend is used instead. "
            "Another Triton version may help; MMVSSM_BACKEND=torch silences this notice.",
            stacklevel=2,
        )
        return torch_call()


def _is_compile_error(error: Exception) -> bool:
    """Failures of compiling a kernel; errors of running one (out of memory, illegal access) must not be hidden."""
    from triton.compiler.errors import CompilationError
    from triton.runtime import errors

    kinds = [CompilationError]
    kinds += [getattr(errors, name) for name in ("OutOfResources", "PTXASError") if hasattr(errors, name)]
    return isinstance(error, tuple(kinds)) or (isinstance(error, RuntimeError) and "PassManager" in str(error))
