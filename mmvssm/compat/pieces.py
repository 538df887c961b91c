"""The list of compatibility pieces: what each is for, when it can go, and whether it is acting in this process."""

from __future__ import annotations

from dataclasses import dataclass, field

_PIECES: dict[str, Piece] = {}


@dataclass
class Piece:
    """One compatibility measure.

    Args:
        name (str): Short name, shown in reports.
        reason (str): What is broken without it, and where.
        until (str): The condition under which the piece can be deleted.
    """

    name: str
    reason: str
    until: str
    detail: str = field(default="", init=False)
    active: bool = field(default=False, init=False)

    def activate(self, detail: str) -> None:
        """Record that the piece acts in this process, with what it did."""
        self.active = True
        self.detail = detail

    def stand_by(self, detail: str) -> None:
        """Record that the piece looked and found nothing to do, with why."""
        if not self.active:
            self.detail = detail


def register(name: str, reason: str, until: str) -> Piece:
    """Create a piece and enter it in the list; called once by each module of :mod:`mmvssm.compat`."""
    piece = Piece(name, reason, until)
    _PIECES[name] = piece
    return piece


def all_pieces() -> list[Piece]:
    """All pieces in the order in which they were installed."""
    return list(_PIECES.values())


def summary() -> str:
    """One line that names the pieces acting in this process, e.g. for the log of a run."""
    acting = [f"{piece.name} ({piece.detail})" for piece in all_pieces() if piece.active]
    if not acting:
        return "mmvssm compatibility: nothing active"
    return "mmvssm compatibility: " + "; ".join(acting)
