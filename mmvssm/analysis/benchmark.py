"""A table of speeds: many models, sizes and kinds of execution, measured one after the other without supervision."""

import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mmvssm.analysis.contenders import build_classifier
from mmvssm.analysis.speed import measure_speed
from mmvssm.version import __version__

BATCH, BATCH_PIXELS = 128, 224 * 224
TF32 = ("default", "on", "off")
FITS, TOO_LARGE, FAILED = "measured", "does not fit", "error"
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


class Size(NamedTuple):
    """Images of one size: height, width, and how many."""

    height: int
    width: int
    batch: int

    @classmethod
    def parse(cls, text: str, batch: int | None = None) -> "Size":
        """Read '224', '800x1216' (height x width) or either with ':BATCH'.

        Args:
            text: The size.
            batch: Where the text names none; None takes 128 for 224 x 224 and fewer as the number of pixels grows.

        Raises:
            ValueError: The text is no size.
        """
        sides, _, count = text.partition(":")
        try:
            numbers = [int(side) for side in sides.split("x")]
            height, width = numbers * 2 if len(numbers) == 1 else numbers
            batch = int(count) if count else batch or max(1, BATCH * BATCH_PIXELS // (height * width))
        except (ValueError, ZeroDivisionError):
            height = width = batch = 0
        if min(height, width, batch) < 1:
            raise ValueError(
                f"sizes are given as 224, 800x1216 (height x width) or with a batch, 224:128, got {text!r}"
            )
        return cls(height, width, batch)


@dataclass(frozen=True)
class Protocol:
    """How everything in a table is measured.

    Attributes:
        device: 'cpu', 'cuda' or 'cuda:1'.
        channels_last: Whether images and weights are channels_last in memory.
        tf32: 'on' or 'off' for float32 products and convolutions on tensor cores, 'default' for torch's own settings.
        cudnn_benchmark: Whether cuDNN looks for the fastest algorithm of every convolution.
        warmup: Steps before the timed ones.
        repeats: Timed steps, at most.
        seconds: Limit for warm-up and timed steps each, see :func:`measure_speed`; None for no limit.
        kernel_time: Whether the profiler sums up the times of the kernels.
    """

    device: str = "cuda"
    channels_last: bool = False
    tf32: str = "default"
    cudnn_benchmark: bool = False
    warmup: int = 5
    repeats: int = 50
    seconds: float | None = None
    kernel_time: bool = True


class Cell(NamedTuple):
    """One cell of the table."""

    model: str
    size: Size
    mode: str
    dtype: str
    execution: str

    @property
    def key(self) -> dict[str, Any]:
        """What the row says of it."""
        size = dict(height=self.size.height, width=self.size.width, asked_batch=self.size.batch)
        return dict(model=self.model, mode=self.mode, **size, dtype=self.dtype, execution=self.execution)


def cells_of(
    models: Sequence[str],
    sizes: Sequence[Size],
    modes: Sequence[str] = ("inference",),
    dtypes: Sequence[str] = ("fp16",),
    executions: Sequence[str] = ("eager",),
) -> list[Cell]:
    """All combinations; sizes first, then models, so that a table that ends early compares what it has.

    Models with folded batch norms are left out of training, for which they no longer are.
    """
    return [
        Cell(model, size, mode, dtype, execution)
        for size, model, mode, dtype, execution in itertools.product(sizes, models, modes, dtypes, executions)
        if mode != "training" or "folded" not in model.split("@")
    ]


def run_cells(
    cells: Sequence[Cell],
    protocol: Protocol,
    path: str | os.PathLike | None = None,
    resume: bool = False,
    seconds: float | None = None,
    report: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Measure cell after cell, and keep what there is in a file.

    Where a batch does not fit, it is halved until it does. A cell for which not even one image fits, or whose model
    fails, becomes a row that says so, and the run goes on. The file is replaced as a whole after every cell.

    Args:
        cells: See :func:`cells_of`.
        protocol: How to measure.
        path: JSON file for facts and rows, or None.
        resume: Keep the rows that the file has, and measure the other cells. Failed ones are tried again.
        seconds: Begin no further cell after that many seconds.
        report: Called with every new row.

    Returns:
        The rows, those kept included: what :attr:`Cell.key` has, ``status`` ('measured', 'does not fit' or 'error'),
        and for measured ones ``batch``, ``images_per_second``, ``ms`` (median), ``p90``, ``p99``, ``kernel_ms`` (or
        None), ``mib``, ``repeats``; ``error`` for failed ones.

    Raises:
        ValueError: The file that is to be continued was measured with another protocol, device or version.
    """
    facts = facts_of(protocol)
    rows = _rows_to_keep(path, facts) if resume and path is not None and Path(path).exists() else []
    known = [{key: row.get(key) for key in cells[0].key} for row in rows] if cells else []
    start = time.monotonic()
    with _settings(protocol):
        workshop = _Workshop(protocol)
        for cell in cells:
            if cell.key in known:
                continue
            if seconds is not None and time.monotonic() - start > seconds:
                break
            rows.append(cell.key | workshop.measure(cell))
            if path is not None:
                write_table(path, facts, rows)
            report(rows[-1])
    return rows


def facts_of(protocol: Protocol) -> dict[str, Any]:
    """Machine, versions and protocol, as they stand at the head of a file."""
    device = torch.device(protocol.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    versions = dict(mmvssm=__version__, torch=torch.__version__, cuda=torch.version.cuda)
    for name in ("triton", "timm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    with _settings(protocol):
        switches = dict(
            matmul=torch.get_float32_matmul_precision() != "highest", convolutions=torch.backends.cudnn.allow_tf32
        )
    steps = dict(
        inference="forward without gradients, in eval mode",
        training="forward and backward of the mean of the output, in training mode, without an optimiser",
        precision="float32 weights; fp16 and bf16 by autocast",
        timing="every step by itself (CUDA events on a GPU) and waited for; ms is the median",
        memory="peak of torch's allocator in a step after warm-up, weights and gradients included",
    )
    return dict(device=where, versions=versions, tf32=switches, protocol=asdict(protocol), steps=steps)


def write_table(path: str | os.PathLike, facts: dict, rows: Sequence[dict]) -> None:
    """Replace a file by facts and rows, such that it is whole at any time."""
    path = Path(path)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(facts | dict(written=now, rows=list(rows)), indent=1) + "\n")
    temporary.replace(path)


def read_table(path: str | os.PathLike) -> tuple[dict, list[dict]]:
    """Facts and rows of a file of :func:`write_table`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}.")
    try:
        facts = json.loads(path.read_text())
        rows = facts.pop("rows")
        complete = all({"model", "mode", "height", "width", "status"} <= row.keys() for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of speeds ({type(error).__name__}: {error})") from error
    if not complete:
        raise ValueError(f"{path} is no table of speeds: its rows lack model, mode, size or status")
    return facts, rows


def _rows_to_keep(path: str | os.PathLike, facts: dict) -> list[dict]:
    old, rows = read_table(path)
    for part in ("device", "versions", "tf32", "protocol"):
        if old.get(part) != facts[part]:
            raise ValueError(f"{path} was measured with {part} {old.get(part)}, now it would be {facts[part]}")
    return [row for row in rows if row["status"] != FAILED]


class _Workshop:
    """Builds and measures; keeps the last model, since neighbouring cells share it."""

    def __init__(self, protocol: Protocol):
        self.protocol = protocol
        self._name: tuple[str, int, int] | None = None
        self._model: nn.Module | None = None

    def measure(self, cell: Cell) -> dict[str, Any]:
        batch, reason = cell.size.batch, ""
        while batch:
            try:
                return self._measure(cell, batch)
            except Exception as error:  # whatever a model does must not end a run of hours
                if not _is_out_of_memory(error):
                    if os.environ.get("MMVSSM_TRACEBACK", "0") not in ("", "0"):
                        raise
                    self._forget()
                    return dict(status=FAILED, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                reason = " ".join(str(error).split())[:120]
            # Not in the handler, whose traceback keeps the tensors of the failed step alive.
            batch //= 2
            self._forget()
        return dict(status=TOO_LARGE, error=reason)

    def _measure(self, cell: Cell, batch: int) -> dict[str, Any]:
        how = self.protocol
        height, width = cell.size[:2]
        model = self._get(cell.model, height, width)
        images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(how.device)
        if how.channels_last:
            images = images.to(memory_format=torch.channels_last)
        speed = measure_speed(
            model,
            images,
            cell.mode,
            cell.dtype,
            cell.execution,
            repeats=how.repeats,
            warmup=how.warmup,
            seconds=how.seconds,
            kernel_time=how.kernel_time,
        )
        return dict(
            status=FITS,
            batch=batch,
            images_per_second=speed.images_per_second,
            ms=speed.milliseconds,
            p90=speed.p90,
            p99=speed.p99,
            kernel_ms=speed.kernel_milliseconds,
            mib=speed.memory,
            repeats=speed.repeats,
        )

    def _get(self, name: str, height: int, width: int) -> nn.Module:
        if self._name != (name, height, width):
            self._forget()
            model = build_classifier(name, (height, width), self.protocol.device)
            if self.protocol.channels_last:
                model = model.to(memory_format=torch.channels_last)
            self._name, self._model = (name, height, width), model
        return self._model

    def _forget(self) -> None:
        if self._model is None:
            return
        self._name = self._model = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where it came up while a graph was captured, which ends in another error."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _settings(protocol: Protocol) -> Iterator[None]:
    """Switches of the protocol, put back afterwards."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    allow_tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    try:
        if protocol.tf32 != "default":
            torch.set_float32_matmul_precision("high" if protocol.tf32 == "on" else "highest")
            cudnn.allow_tf32 = protocol.tf32 == "on"
        cudnn.benchmark = protocol.cudnn_benchmark
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.benchmark = allow_tf32, benchmark
