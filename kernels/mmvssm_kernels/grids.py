"""Numbers of programs and tiles, on the CPU."""


def cdiv(length: int, size: int) -> int:
    """Tiles of ``size`` that cover ``length``; ``triton.cdiv`` takes 7 us of a CPU, and calls wait for it."""
    return -(-length // size)


def program_count(n_tiles: int, limit: int) -> int:
    """Programs, at most ``limit``, that share ``n_tiles`` tiles of rows such that all have nearly the same number."""
    return cdiv(n_tiles, cdiv(n_tiles, limit))
