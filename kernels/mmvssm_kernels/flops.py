"""Operation counts of the scans, shared by torch's FLOP counter and the analysis tools.

Convention of the VMamba paper (arXiv:2401.10166): 9 N + 1 operations per token, channel and direction, with N the state
size. Matrix products inside an operator count two per multiply-add, as torch's FLOP counter counts them.
"""

# Operations of a backward pass beside those of its forward pass: it recomputes the states and runs the adjoint scan.
BACKWARD_FACTOR = 2


def scan_flops(batch: int, channels: int, length: int, state: int, directions: int = 1) -> int:
    """Operations of a selective scan with skip connection."""
    return (9 * state + 1) * directions * batch * channels * length


def projection_flops(batch: int, channels: int, length: int, state: int, rank: int, directions: int) -> int:
    """Operations of the input-dependent projections: channels -> (rank + 2 state), and rank -> channels."""
    return 2 * directions * batch * length * channels * ((rank + 2 * state) + rank)
