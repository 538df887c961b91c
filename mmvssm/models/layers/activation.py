"""Activations by name."""

from torch import nn

ACTIVATIONS: dict[str | None, type[nn.Module]] = {
    None: nn.Identity,
    "gelu": nn.GELU,  # the exact (erf) form, as in the released weights
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def build_activation(name: str | None, argument: str = "act") -> nn.Module:
    """Build the activation called ``name``.

    Args:
        name: 'silu', 'gelu' (exact), 'relu', or None for the identity.
        argument: Name of the constructor argument, for the error message.

    Raises:
        ValueError: If there is no such activation.
    """
    if not (name is None or isinstance(name, str)) or name not in ACTIVATIONS:
        known = ", ".join(repr(key) for key in ACTIVATIONS)
        raise ValueError(f"{argument}={name!r} is not an activation; choose one of {known}")
    return ACTIVATIONS[name]()
