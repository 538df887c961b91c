"""How the Triton kernels cut a map into tiles and segments; the operator's schema needs it too, without Triton."""

import torch

# Tokens of a tile; a row or column is cut into tiles of its own.
TILE_TOKENS = 2
# Tiles of a segment, the part of a sequence that one program walks. Shorter segments give few rows more parallelism and
# let what a program reads twice stay in the cache; they cost memory for the states at their borders, which grows with
# the number of states.
_SEGMENT_TILES = 16
_SEGMENT_TILES_MANY_STATES = 128


def segment_tiles(state: int) -> int:
    """Tiles of a segment when there are ``state`` states per channel and more than one segment."""
    return _SEGMENT_TILES if state == 1 else _SEGMENT_TILES_MANY_STATES


def count_segments(height: int, width: int, state: int) -> int:
    """Segments of a sequence, enough for rows and for columns: one up to twice the length of a segment.

    Written without a branch for symbolic sizes.
    """
    rows = height * ((width + TILE_TOKENS - 1) // TILE_TOKENS)
    columns = width * ((height + TILE_TOKENS - 1) // TILE_TOKENS)
    tiles, length = torch.sym_max(rows, columns), segment_tiles(state)
    is_long = torch.sym_min(1, torch.sym_max(0, tiles - 2 * length))
    return 1 + is_long * ((tiles + length - 1) // length - 1)
