"""Argument checks shared by the public functions: each failure is one sentence."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: object, shape: tuple, device: torch.device | None = None) -> None:
    """Raise unless ``tensor`` is a floating tensor of ``shape``.

    Args:
        name: Name of the argument in the public function.
        tensor: The argument.
        shape: Expected sizes: an integer, or a letter where any size is allowed.
        device: Expected device, if fixed by an earlier argument.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If rank, size, dtype or device is wrong.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, but it is {type(tensor).__name__}")
    given = tuple(tensor.shape)
    if len(given) != len(shape) or any(isinstance(s, int) and s != g for s, g in zip(shape, given, strict=True)):
        expected = ", ".join(str(s) for s in shape)  # only here: torch.compile cannot trace it for sizes that vary
        raise ValueError(f"{name} must have shape ({expected}), but its shape is {given}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, but it is {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the first argument, but it is on {tensor.device}")


def checked_dtype(name: str, dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """``dtype``, or ``default`` for None.

    Raises:
        TypeError: If it is no dtype.
        ValueError: If it is not one of the floating dtypes.
    """
    if dtype is None:
        return default
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, but it is {type(dtype).__name__}")
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, but it is {dtype}")
    return dtype


def check_positive(name: str, size: int, what: str) -> None:
    """Raise unless the axis ``what`` of argument ``name`` has at least one element."""
    if size < 1:
        raise ValueError(f"{name} must have at least one {what}, but it has {size}")


def computing_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.promote_types(tensor.dtype, torch.float32)
