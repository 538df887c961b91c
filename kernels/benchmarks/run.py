"""Time the operators beside the floor of the hardware, the torch backend and other packages.

    python kernels/benchmarks/run.py [--only SUBSTRING] [--json FILE] [--plot FILE] [--torch] [--peers]

Every case is checked against the float64 recurrence first, on a batch of one; a case that fails is not timed. Times are
medians in milliseconds: of the whole call, by CUDA events and with a flushed L2 cache, and of its kernels alone, by
torch's profiler. "/ floor" divides the kernel time by the least time that one H200 needs for the bytes, exponentials or
multiply-adds of the case, whichever takes longest. Launches are those beside matrix products. Results are written as
they come, so that nothing is lost when a run is stopped. On a CPU (--device cpu) only the torch backend is timed.
"""

import argparse
import contextlib
import json
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import CASES, SERIES
from floors import floors
from peers import peer
from timing import Call, median_ms, profile_kernels

from mmvssm_kernels.testing import OPERATORS, check_operator, relative_error

# A peer may round where we do not; what differs by more computes something else.
PEER_TOLERANCE = 3e-2


def operator_call(case: NamedTuple, backend: str) -> Callable:
    """The case's operator as a function of the inputs alone."""
    operator, options = OPERATORS[type(case)], case.options()
    return lambda *inputs: operator(*inputs, **options, backend=backend)


def time_call(function: Callable, inputs: list, device: str) -> dict[str, float]:
    """Forward and backward milliseconds; on a GPU also kernel time, launches and MiB held."""
    call = Call(function, inputs)
    with torch.no_grad():
        row = {"forward_ms": median_ms(call.forward, device)}
        if device == "cuda":
            row |= {f"forward_{k}": v for k, v in _kernels(call.forward).items()}
    backward, held = call.backward()
    row["backward_ms"] = median_ms(backward, device)
    if device == "cuda":
        row |= {f"backward_{k}": v for k, v in _kernels(backward).items()} | {"held_mib": held}
    return row


def _kernels(function: Callable) -> dict[str, float]:
    kernels = profile_kernels(function)
    return {"kernel_ms": kernels.milliseconds, "launches": kernels.launches, "products": kernels.products}


def time_peer(case: NamedTuple, inputs: list, device: str) -> dict[str, Any]:
    """Times of another package, or why there are none."""
    found = peer(case)
    if found is None:
        return {}
    package, function = found
    try:
        with torch.no_grad():
            want = Call(operator_call(case, "auto"), inputs).forward()[0]
            error = relative_error(function(*inputs), want)
        if not error < PEER_TOLERANCE:
            return {"peer": package, "peer_problem": f"differs by {error:.1e}"}
        times = time_call(function, inputs, device)
    except Exception as error:  # whatever happens inside another package must not end the run
        return {"peer": package, "peer_problem": f"{type(error).__name__}: {error}"[:200]}
    return {"peer": package, **{f"peer_{name}": value for name, value in times.items()}}


def measure(case: NamedTuple, args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for about one case.

    Raises:
        AssertionError: The result is wrong.
    """
    dtype = getattr(torch, args.dtype)
    backend = "triton" if args.device == "cuda" else "torch"
    check_operator(OPERATORS[type(case)], case._replace(batch=1), dtype, args.device, backend)
    inputs = case.inputs(dtype, args.device)
    row = time_call(operator_call(case, backend), inputs, args.device)
    least = floors(case, inputs[0].element_size())
    row |= dict(zip(("forward_floor_ms", "backward_floor_ms"), least, strict=True))
    if args.torch and backend != "torch":
        try:
            times = time_call(operator_call(case, "torch"), inputs, args.device)
            row |= {f"torch_{name}": value for name, value in times.items()}
        except torch.OutOfMemoryError:
            row["torch_problem"] = "out of memory"
    if args.peers:
        row |= time_peer(case, inputs, args.device)
    return row


def columns(args: argparse.Namespace) -> dict[str, Callable[[dict], float | None]]:
    """Heading of each column and what it shows of a row."""
    found = {}
    for heading, part in (("fwd", "forward"), ("bwd", "backward")):
        found[heading] = lambda row, part=part: row[f"{part}_ms"]
        if args.device == "cuda":
            found[f"{heading} kernels"] = lambda row, part=part: row[f"{part}_kernel_ms"]
            found["/ floor" + " " * len(found)] = lambda row, part=part: (
                row[f"{part}_kernel_ms"] / row[f"{part}_floor_ms"]
            )
            found["launches" + " " * len(found)] = lambda row, part=part: row[f"{part}_launches"]
        if args.torch:
            found[f"torch {heading}"] = lambda row, part=part: row.get(f"torch_{part}_ms")
        if args.peers:
            found[f"peer {heading}"] = lambda row, part=part: row.get(f"peer_{part}_ms")
    if args.device == "cuda":
        found["held MiB"] = lambda row: row["held_mib"]
    return found


def line(row: dict, shown: dict[str, Callable[[dict], float | None]]) -> str:
    """A row of the table."""
    text = ""
    for heading, value_of in shown.items():
        width, value = max(len(heading.strip()), 7) + 2, value_of(row)
        digits = 1 if heading.startswith(("/ floor", "launches", "held")) else 3
        text += f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
    return text + (f"  {row['peer']}: {row['peer_problem']}" if "peer_problem" in row else "")


def run_cases(cases: dict[Any, NamedTuple], args: argparse.Namespace, record: Callable[[Any, dict], None]) -> bool:
    """Measure, print and record every case; whether all of them passed their checks."""
    shown, passed = columns(args), True
    print(f"{'case':28}" + "".join(f"{h.strip():>{max(len(h.strip()), 7) + 2}}" for h in shown))
    for key, case in cases.items():
        name = str(key)
        try:
            row = measure(case, args)
        except Exception:  # one broken case must not hide the others
            passed = False
            print(f"{name:28} not timed: its check failed")
            traceback.print_exc(limit=2)
            continue
        record(key, row)
        print(f"{name:28}" + line(row, shown), flush=True)
    return passed


def plot(series: dict[str, dict[int, dict]], path: Path, title: str) -> None:
    """Time over sequence length, a panel for each series; on a GPU that of the kernels: the floor knows no waiting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(series) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(13, 4.4 * rows), squeeze=False, layout="constrained")
    for axis, (name, measured) in zip(axes.flat, series.items(), strict=False):
        for key, label in _CURVES.items():
            kernels = key.replace("_ms", "_kernel_ms")
            times = {length: row.get(kernels, row.get(key)) for length, row in measured.items()}
            points = [(length, time) for length, time in times.items() if time is not None]
            if points:
                style = "--" if "floor" in key else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=label)
        axis.set(title=name, xscale="log", yscale="log", xlabel="tokens in a sequence", ylabel="ms")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(series) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_CURVES = {
    "forward_ms": "forward",
    "backward_ms": "backward",
    "torch_forward_ms": "forward, torch backend",
    "torch_backward_ms": "backward, torch backend",
    "peer_forward_ms": "forward, other package",
    "peer_backward_ms": "backward, other package",
    "forward_floor_ms": "floor of forward",
    "backward_floor_ms": "floor of backward",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases and series whose names contain it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also time series of lengths, and draw them (PNG)")
    parser.add_argument("--torch", action="store_true", help="time the torch backend, too")
    parser.add_argument("--peers", action="store_true", help="time mamba_ssm, causal_conv1d and fla where installed")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cases = {name: case for name, case in CASES.items() if args.only in name}
    series = {name: cases for name, cases in SERIES.items() if args.only in name} if args.plot else {}
    if not cases and not series:
        names = ", ".join([*CASES, *SERIES])
        print(f"error: --only {args.only!r} matches no case; there are: {names}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU; --device cpu times the torch backend on a CPU", file=sys.stderr)
        return 2
    machine = f"{_device_name(args.device)}, torch {torch.__version__}, Triton {_triton_version()}, {args.dtype}"
    print(f"{machine}, Python {platform.python_version()}")
    report: dict[str, Any] = {"machine": machine, "dtype": args.dtype, "results": {}, "series": {}}

    def record(group: dict, name: Any, row: dict) -> None:
        group[name] = row
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))

    passed = run_cases(cases, args, lambda name, row: record(report["results"], name, row))
    for name, lengths in series.items():
        print(f"\n{name}, over the length")
        group = report["series"].setdefault(name, {})
        passed &= run_cases(lengths, args, lambda length, row, group=group: record(group, length, row))
    if args.plot:
        plot(report["series"], args.plot, machine)
    return 0 if passed else 1


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _triton_version() -> str:
    with contextlib.suppress(ImportError):
        import triton

        return triton.__version__
    return "absent"


if __name__ == "__main__":
    sys.exit(main())
