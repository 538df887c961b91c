"""Operation counts of the scans, shared by torch's FLOP counter and the analysis tools.

Convention of the VMamba paper (arXiv:2401.10166): 9 N + 1 operations per token, channel and direction, with N the state
size. Matrix products inside an operator count two per multiply-add, as torch's FLOP counter counts them.
"""

import sys
from collections.abc import Callable

import torch

_formulas: dict[str, Callable] = {}

# Operations of a backward pass beside those of its forward pass: it recomputes the states and runs the adjoint scan.
BACKWARD_FACTOR = 2


def scan_flops(batch: int, channels: int, length: int, state: int, directions: int = 1) -> int:
    """Operations of a selective scan with skip connection."""
    return (9 * state + 1) * directions * batch * channels * length


def projection_flops(batch: int, channels: int, length: int, state: int, rank: int, directions: int) -> int:
    """Operations of the input-dependent projections: channels -> (rank + 2 state), and rank -> channels."""
    return 2 * directions * batch * length * channels * ((rank + 2 * state) + rank)


def flop_formula(operator: str) -> Callable[[Callable], Callable]:
    """Decorator: the formula of ``torch.ops.mmvssm.<operator>`` for torch's FLOP counter, called with shapes."""

    def add(formula: Callable) -> Callable:
        _formulas[operator] = formula
        return formula

    return add


def register_formulas() -> None:
    """Hand the formulas to torch's FLOP counter once somebody uses it.

    Importing the counter imports Triton, which a program that counts nothing need not pay for; so this runs at each
    call of an operator and does nothing until the counter is there.
    """
    if _formulas and "torch.utils.flop_counter" in sys.modules:
        from torch.utils.flop_counter import register_flop_formula

        while _formulas:
            operator, formula = _formulas.popitem()
            register_flop_formula(getattr(torch.ops.mmvssm, operator))(formula)
