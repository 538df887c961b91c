"""How the Triton kernels cut a map into segments; the operator's schema needs it too, without Triton."""

# Tokens in a lane and groups of lanes of a warp, which has one segment of a sequence at a time. More tokens in a lane
# share the cost of what goes from group to group, and need registers.
LANE_TOKENS = 4
GROUPS = 8


def count_segments(height: int, width: int) -> int:
    """Segments of a sequence."""
    tokens = LANE_TOKENS * GROUPS
    return (height * width + tokens - 1) // tokens
