"""How the Triton kernels cut a map into tiles; the operator's schema needs it too, without Triton."""

# Tokens in a lane and groups of lanes of a warp, which has one tile of a sequence at a time. More tokens in a lane
# share the cost of what goes from group to group, and need registers.
LANE_TOKENS = 4
GROUPS = 8


def count_tiles(height: int, width: int) -> int:
    """Tiles of a sequence."""
    tokens = LANE_TOKENS * GROUPS
    return (height * width + tokens - 1) // tokens
