"""How far the feature export has come: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

_INTERVAL = 30.0  # seconds between two lines where output is no terminal


class Progress:
    """Count, speed and remaining time, on stderr.

    Args:
        what: Noun for the things that are counted.
        total: How many there are.
        done: How many of them were finished before; not counted in the speed.
        show: Whether to show anything.
    """

    def __init__(self, what: str, total: int, done: int, show: bool):
        self.what, self.total, self.done, self.show = what, total, done, show
        self._new = 0
        self._started = self._told = time.perf_counter()

    def __enter__(self) -> "Progress":
        self._bar = self._open() if self.show and sys.stderr.isatty() else None
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.show:
            self._tell()

    def advance(self, count: int) -> None:
        self._new += count
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=self._speed())
        elif self.show and time.perf_counter() - self._told > _INTERVAL:
            self._tell()

    def _open(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        speed = TextColumn("{task.fields[speed]}")
        left = (TextColumn("left"), TimeRemainingColumn())
        bar = Progress(
            TextColumn(self.what), BarColumn(), MofNCompleteColumn(), speed, *left, console=Console(stderr=True)
        )
        self._task = bar.add_task(self.what, total=self.total, completed=self.done, speed="")
        bar.start()
        return bar

    def _speed(self) -> str:
        seconds = time.perf_counter() - self._started
        return f"{self._new / seconds:.1f} {self.what}/s" if seconds else ""

    def _tell(self) -> None:
        self._told = time.perf_counter()
        line = f"{self.done}/{self.total} {self.what}, {self._speed()}"
        if self._new and self.done < self.total:
            seconds = round((self._told - self._started) * (self.total - self.done) / self._new)
            line += f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        print(line, file=sys.stderr, flush=True)
