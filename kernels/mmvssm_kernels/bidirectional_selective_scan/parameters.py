"""Parameters of one direction, and their checks."""

from typing import NamedTuple

from torch import Tensor

from ..checks import check_positive, check_tensor


class ScanParameters(NamedTuple):
    """What one direction of :func:`mmvssm_kernels.bidirectional_selective_scan` owns.

    E channels, W taps, R rank of the step sizes, N states.

    Attributes:
        conv_weight: Taps of the depthwise convolution (E, W); the last one weighs the current token.
        conv_bias: (E).
        x_proj_weight: Projection of a token to step-size rank, input and output weights (R + 2N, E).
        dt_proj_weight: (E, R).
        dt_proj_bias: (E).
        A_log: Logarithms of the decay rates (E, N), ``A = -exp(A_log)``.
        D: Skip weights (E).
    """

    conv_weight: Tensor
    conv_bias: Tensor
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_proj_bias: Tensor
    A_log: Tensor
    D: Tensor

    @property
    def rank(self) -> int:
        """Rank R of the step sizes."""
        return self.dt_proj_weight.shape[1]

    @property
    def state(self) -> int:
        """State size N."""
        return self.A_log.shape[1]


def split_parameters(parameters: list[Tensor]) -> list[ScanParameters]:
    """The flat list of one or two directions' tensors, direction by direction."""
    size = len(ScanParameters._fields)
    return [ScanParameters(*parameters[i : i + size]) for i in range(0, len(parameters), size)]


def check_parameters(name: str, parameters, channels: int, device) -> ScanParameters:
    """The argument ``name`` as :class:`ScanParameters`, or an error that names its wrong member."""
    if not isinstance(parameters, tuple | list) or len(parameters) != len(ScanParameters._fields):
        raise TypeError(
            f"{name} must be a ScanParameters of {len(ScanParameters._fields)} tensors "
            f"({', '.join(ScanParameters._fields)}), but it is {type(parameters).__name__}"
            + (f" of length {len(parameters)}" if isinstance(parameters, tuple | list) else "")
        )
    parameters = ScanParameters(*parameters)
    check_tensor(f"{name}.conv_weight", parameters.conv_weight, (channels, "W"), device)
    check_positive(f"{name}.conv_weight", parameters.conv_weight.shape[1], "tap (axis 1)")
    check_tensor(f"{name}.conv_bias", parameters.conv_bias, (channels,), device)
    check_tensor(f"{name}.dt_proj_weight", parameters.dt_proj_weight, (channels, "R"), device)
    check_positive(f"{name}.dt_proj_weight", parameters.rank, "rank (axis 1)")
    check_tensor(f"{name}.A_log", parameters.A_log, (channels, "N"), device)
    check_positive(f"{name}.A_log", parameters.state, "state (axis 1)")
    rows = parameters.rank + 2 * parameters.state
    check_tensor(f"{name}.x_proj_weight", parameters.x_proj_weight, (rows, channels), device)
    check_tensor(f"{name}.dt_proj_bias", parameters.dt_proj_bias, (channels,), device)
    check_tensor(f"{name}.D", parameters.D, (channels,), device)
    return parameters


def check_alike(forward: ScanParameters, backward: ScanParameters) -> None:
    """Raise unless both directions have the same sizes."""
    for field, one, other in zip(ScanParameters._fields, forward, backward, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"backward.{field} must have the shape {tuple(one.shape)} of forward.{field}, "
                f"but its shape is {tuple(other.shape)}"
            )
