"""Speed and memory of classifiers side by side: latency, images per second, kernel time, over models and sizes.

    python tools/analysis_tools/benchmark_models.py vim-tiny timm:deit_tiny_patch16_224 \\
        timm:deit_tiny_patch16_224@plain --sizes 224 512 1024 2048 --modes inference training --dtype fp16 \\
        --execution eager graph --seconds-per-cell 10 --json speed.json --plot speed.png \\
        --crossover vim-tiny timm:deit_tiny_patch16_224

A model is a short name of the zoo, or `timm:` and a name of timm, if that is installed. `@plain` behind one of timm's
computes its attention as two products and a softmax instead of by torch's fused operator; `@folded` behind one of the
zoo folds its batch norms away, for inference (it is left out of training). Every model is built for the size at hand,
with random weights.

A batch that does not fit is halved until it does. A model that fails or of which not one image fits becomes a row that
says so. The JSON file is whole after every cell; `--resume` continues it, `--from` makes tables and plots of such files
without measuring. Exit codes: 0; 2 after a mistake, told in one sentence; 3 if a model failed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli


def measure(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Facts and rows of a new or continued run."""
    import torch

    from mmvssm.analysis import benchmark
    from mmvssm.analysis.contenders import parse_contender

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise cli.UserError(f"--device {args.device}: torch sees no GPU; --device cpu times the CPU")
    if not args.device.startswith("cuda") and any("graph" in execution for execution in args.execution):
        raise cli.UserError(f"--execution {' '.join(args.execution)}: CUDA graphs need a GPU")
    for name in ("repeats", "warmup"):
        if getattr(args, name) < 1:
            raise cli.UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.resume and not args.json:
        raise cli.UserError("--resume continues a file, which --json has to name")
    for name in args.models:
        parse_contender(name)
    protocol = benchmark.Protocol(
        device=args.device,
        channels_last=args.channels_last,
        tf32=args.tf32,
        cudnn_benchmark=args.cudnn_benchmark,
        warmup=args.warmup,
        repeats=args.repeats,
        seconds=args.seconds_per_cell,
        kernel_time=not args.no_kernel_time,
    )
    sizes = [benchmark.Size.parse(text, args.batch_size) for text in args.sizes]
    cells = benchmark.cells_of(args.models, sizes, args.modes, args.dtype, args.execution)
    facts = benchmark.facts_of(protocol)
    print(f"{facts['device']}, {', '.join(f'{k} {v}' for k, v in facts['versions'].items() if v)}")
    print(", ".join(f"{k} {v}" for k, v in facts["protocol"].items()), f"tf32 {facts['tf32']}", sep=", ", flush=True)
    rows = benchmark.run_cells(
        cells,
        protocol,
        args.json,
        args.resume,
        args.total_seconds,
        lambda row: print(comparison_line(row), flush=True),
    )
    left = len(cells) - sum(any(row | cell.key == row for row in rows) for cell in cells)
    if left:
        print(f"{left} of {len(cells)} cells were not begun within --total-seconds {args.total_seconds:g}")
    return facts, rows


def comparison_line(row: dict) -> str:
    from mmvssm.analysis.comparison import line

    return line(row)


def read(paths: Sequence[str]) -> tuple[dict, list[dict]]:
    """Facts of the first file and rows of all."""
    from mmvssm.analysis.benchmark import read_table

    tables = [read_table(path) for path in paths]
    devices = {str(facts.get("device")) for facts, _ in tables}
    if len(devices) > 1:
        raise cli.UserError(f"--from: the files are of different devices, {', '.join(sorted(devices))}")
    return tables[0][0], [row for _, rows in tables for row in rows]


def run(args: argparse.Namespace) -> int:
    from mmvssm.analysis import comparison
    from mmvssm.analysis.benchmark import FAILED, FITS

    if bool(args.models) == bool(args.read_from):
        raise cli.UserError("give either models to measure or --from with files that were written before")
    if args.read_from and (args.json or args.resume):
        raise cli.UserError("--json and --resume are for measuring; --from measures nothing")
    for first, second in args.crossover:
        if args.models and (missing := {first, second} - set(args.models)):
            raise cli.UserError(f"--crossover: {missing.pop()} is not among the models")
    facts, rows = read(args.read_from) if args.read_from else measure(args)
    crossovers = []
    for pair in args.crossover:
        if args.models and (missing := set(pair) - {row["model"] for row in rows}):  # the time was over before
            print(f"no crossover of {' and '.join(pair)}: {missing.pop()} was not measured")
            continue
        crossovers += comparison.find_crossovers(rows, *pair)
    print(*crossovers, sep="\n")
    if args.crossover and args.json:
        path = Path(args.json).with_suffix(".crossovers.json")
        path.write_text(json.dumps([crossover.as_dict() for crossover in crossovers], indent=1) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(comparison.markdown(rows) + "\n")
    if args.plot and any(row["status"] == FITS for row in rows):
        versions = facts.get("versions", {})
        title = f"{facts.get('device')}, torch {versions.get('torch')}"
        comparison.plot(rows, args.plot, title, crossovers)
    return 3 if any(row["status"] == FAILED for row in rows) else 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from mmvssm.analysis.benchmark import TF32
    from mmvssm.analysis.speed import DTYPES, EXECUTIONS, MODES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", help="short names of the zoo, or timm:NAME; variants @plain and @folded")
    add("--sizes", nargs="+", default=["224"], help="224, 800x1216 (height x width), either with a batch: 224:128")
    add("--batch-size", type=int, help="where the size names none; else 128 at 224 pixels and fewer above")
    add("--modes", nargs="+", choices=MODES, default=["inference"])
    add("--dtype", nargs="+", choices=list(DTYPES), default=["fp16"], help="of autocast (fp16)")
    add("--execution", nargs="+", choices=EXECUTIONS, default=["eager"], help="ways to run a step (eager)")
    add("--channels-last", action="store_true", help="memory layout of images and weights")
    add("--tf32", choices=TF32, default="default", help="tensor cores for float32: default is torch's own setting")
    add("--cudnn-benchmark", action="store_true", help="let cuDNN search for the fastest convolutions")
    add("--warmup", type=int, default=5, help="steps before the timed ones (%(default)s)")
    add("--repeats", type=int, default=50, help="timed steps (%(default)s)")
    add("--seconds-per-cell", type=float, help="limit for warm-up and timed steps each; two steps are always run")
    add("--total-seconds", type=float, help="begin no further cell after that time")
    add("--no-kernel-time", action="store_true", help="leave the profiler out")
    add("--device", default="cuda")
    add("--json", help="file for facts and rows, written after every cell")
    add("--resume", action="store_true", help="keep what the --json file has, measure the rest")
    add("--from", dest="read_from", nargs="+", metavar="JSON", help="measure nothing: take the rows of these files")
    add("--plot", help="draw time and memory over the size to this picture")
    add("--markdown", help="write the rows as a table to this file")
    add("--crossover", nargs=2, action="append", default=[], metavar=("A", "B"), help="where does A overtake B?")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    codes: list[int] = []
    mistake = cli.run_tool(lambda: codes.append(run(args)))
    return mistake or codes[0]


if __name__ == "__main__":
    sys.exit(main())
