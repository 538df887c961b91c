"""Operators of namespace ``mmvssm`` in torch: schema, implementation, fake, gradient.

``torch.library.custom_op`` does the same and more: at every call it compares all outputs with all inputs for shared
memory and fills in defaults. That takes longer than launching a kernel, and a network of small kernels waits for it.
Here these checks are left to ``torch.library.opcheck`` in the tests.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("mmvssm", "FRAGMENT")


class Operator:
    """``torch.ops.mmvssm.<name>``, callable with positional arguments.

    Args:
        name: Name in the namespace.
        function: Implementation for all devices, annotated with types that ``torch.library.infer_schema`` knows. It
            changes no argument, and no result shares memory with an argument or another result.
    """

    def __init__(self, name: str, function: Callable):
        self._name = name
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self._overload = getattr(torch.ops.mmvssm, name).default
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)

    def register_fake(self, function: Callable) -> Callable:
        """Decorator: the function that makes outputs of the right shapes, dtypes and strides from fake inputs."""
        torch.library.register_fake(f"mmvssm::{self._name}", function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Make the operator differentiable.

        Args:
            backward: ``backward(ctx, *output_gradients)`` gives a gradient or None for every argument; for a list of
                tensors a list.
            setup_context: ``setup_context(ctx, inputs, output)`` saves what that needs.
        """
        overload = self._overload

        def redispatch(keyset, args):
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        class Function(torch.autograd.Function):
            """Autograd sees tensors only as arguments of their own, so lists come apart and are put together again."""

            @staticmethod
            def forward(ctx, keyset, lengths, *flat):
                args = _nested(flat, lengths)
                output = redispatch(keyset, args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx, *gradients):
                return None, None, *_flat(backward(ctx, *gradients))[0]

        def differentiable(keyset, *args):
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                flat, lengths = _flat(args)
                return Function.apply(keyset, lengths, *flat)
            return redispatch(keyset, args)

        _LIBRARY.impl(self._name, differentiable, "Autograd", with_keyset=True)


def custom_op(name: str) -> Callable[[Callable], Operator]:
    """Decorator that registers a function as ``torch.ops.mmvssm.<name>``."""
    return lambda function: Operator(name, function)


def _flat(args: Sequence[Any]) -> tuple[Sequence[Any], tuple[int | None, ...] | None]:
    """Arguments with the members of lists one by one, and the lengths of these lists; None if there are no lists."""
    if not any(isinstance(a, list) for a in args):
        return args, None
    lengths = tuple(len(a) if isinstance(a, list) else None for a in args)
    return [b for a in args for b in (a if isinstance(a, list) else (a,))], lengths


def _nested(flat: Sequence[Any], lengths: tuple[int | None, ...] | None) -> Sequence[Any]:
    """The inverse of :func:`_flat`."""
    if lengths is None:
        return flat
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]
