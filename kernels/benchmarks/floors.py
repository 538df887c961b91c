"""The least time that a GPU needs for a case: the largest of its bytes, exponentials and multiply-adds."""

from typing import NamedTuple

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

# Measured rates of one H200: bytes of a device copy, exponentials and multiply-adds per second.
BYTES, EXPONENTIALS, MULTIPLY_ADDS = 4.27e12, 4.18e12, 32.1e12


class Work(NamedTuple):
    """What one pass cannot do without.

    Attributes:
        bytes: Every input read once, every output written once.
        exponentials: Exponentials and logarithms.
        multiply_adds: Those of the vector units; matrix products are left out.
    """

    bytes: float
    exponentials: float = 0.0
    multiply_adds: float = 0.0

    def milliseconds(self) -> float:
        """The time on one H200."""
        return 1e3 * max(self.bytes / BYTES, self.exponentials / EXPONENTIALS, self.multiply_adds / MULTIPLY_ADDS)


def floors(case: NamedTuple, itemsize: int) -> tuple[float, float]:
    """Milliseconds of forward and backward on one H200, for rows of ``itemsize`` bytes an element."""
    forward, backward = _WORK[type(case)](case, itemsize)
    return forward.milliseconds(), backward.milliseconds()


def _scan(case: Scan, itemsize: int) -> tuple[Work, Work]:
    tokens = case.batch * case.length
    elements, weights = tokens * case.channels, 2 * tokens * case.groups * case.state
    rows = 3 + case.gate  # u, delta, z and y; then also dy and the three gradients
    return (
        Work(itemsize * (rows * elements + weights), elements * (case.state + 2), elements * (4 * case.state + 3)),
        Work(
            itemsize * ((2 * rows - 1) * elements + 2 * weights),
            elements * (case.state + 3),
            elements * (11 * case.state + 8),
        ),
    )


def _scan_2d(case: Scan2d, itemsize: int) -> tuple[Work, Work]:
    tokens = case.batch * case.height * case.width
    projected = 4 * (case.rank + 2 * case.state)
    elements = 4 * tokens * case.channels
    return (
        Work(
            itemsize * tokens * (3 * case.channels + 2 * projected),
            elements * (case.state + 2),
            elements * (case.rank + 4 * case.state + 3),
        ),
        Work(
            itemsize * tokens * (5 * case.channels + 6 * projected),
            elements * (case.state + 3),
            elements * (2 * case.rank + 11 * case.state + 8),
        ),
    )


def _bidirectional_scan(case: BidirectionalScan, itemsize: int) -> tuple[Work, Work]:
    tokens = case.batch * case.length
    projected = case.rank + 2 * case.state
    elements = case.directions * tokens * case.channels
    return (
        Work(
            itemsize * tokens * (5 * case.channels + 3 * projected),
            elements * (case.state + 5),
            elements * (case.width + case.rank + 4 * case.state + 3),
        ),
        Work(
            itemsize * tokens * (8 * case.channels + 5 * projected),
            elements * (case.state + 7.5),
            elements * (case.width + 2 * case.rank + 11 * case.state + 8),
        ),
    )


def _bidirectional_gla(case: BidirectionalGla, itemsize: int) -> tuple[Work, Work]:
    tokens = case.batch * case.length * case.heads
    inputs_and_output = 2 * (2 * case.keys + case.values)  # q, k and both gates; v and the output
    exponentials = 8 * tokens * case.keys
    return (
        Work(itemsize * tokens * inputs_and_output, exponentials),
        Work(itemsize * tokens * (2 * inputs_and_output - case.values), exponentials),
    )


def _conv1d(case: Conv1d, itemsize: int) -> tuple[Work, Work]:
    elements = case.batch * case.channels * case.length
    return Work(2 * itemsize * elements), Work(3 * itemsize * elements)


def _add_norm(case: AddNorm, itemsize: int) -> tuple[Work, Work]:
    elements = case.batch * case.channels * case.length
    if case.alone:
        return Work(2 * itemsize * elements), Work(3 * itemsize * elements)
    # A float32 residual stream in and out; the stream and two float32 gradients of it.
    return Work((2 * itemsize + 8) * elements), Work((2 * itemsize + 12) * elements)


def _gate(case: Gate, itemsize: int) -> tuple[Work, Work]:
    elements = case.batch * case.length * case.heads * case.values
    return Work(4 * itemsize * elements), Work(7 * itemsize * elements)


def _swiglu(case: SwiGlu, itemsize: int) -> tuple[Work, Work]:
    elements = case.batch * case.length * case.hidden
    return Work(3 * itemsize * elements), Work(5 * itemsize * elements)


def _bias_activation(case: BiasActivation, itemsize: int) -> tuple[Work, Work]:
    elements = case.batch * case.length * case.channels
    return Work((2 + case.residual) * itemsize * elements), Work(3 * itemsize * elements)


_WORK = {
    Scan: _scan,
    Scan2d: _scan_2d,
    BidirectionalScan: _bidirectional_scan,
    BidirectionalGla: _bidirectional_gla,
    Conv1d: _conv1d,
    AddNorm: _add_norm,
    Gate: _gate,
    SwiGlu: _swiglu,
    BiasActivation: _bias_activation,
}
