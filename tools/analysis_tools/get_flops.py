"""Parameters and operations of a model, in total and by module.

    python tools/analysis_tools/get_flops.py vmamba-tiny-s1l8 --shape 224 --depth 3 --json flops.json

Two conventions are printed: that of the published tables (a multiply-add counts 1) and that of hardware (2). Scans,
attention and the padding up to windows or patches count in both; see mmvssm/analysis/flops.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli

# Input sizes of the published tables: detectors at 1280 x 800 pixels, segmentors at 2048 x 512.
DEFAULT_SHAPES = {"classification": (224, 224), "detection": (800, 1280), "segmentation": (512, 2048)}


def build_model(cfg):
    """The config's model with random weights; nothing is downloaded."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.default_scope)
    model = dict(cfg.model)
    if "data_preprocessor" not in model and cfg.get("data_preprocessor") is not None:
        model["data_preprocessor"] = cfg.data_preprocessor
    return MODELS.build(model)


def modules(cost, other, depth: int) -> list[dict]:
    """Modules down to ``depth`` levels that hold parameters or operations; the first, without a name, is the whole."""
    rows = []
    for name, parameters in cost.module_parameters.items():
        papers, hardware = (count.flops.by_module.get(name, 0) for count in (cost, other))
        if (name and name.count(".") >= depth) or not (parameters or papers):
            continue
        rows.append(dict(module=name, parameters=parameters, multiply_add_1=papers, multiply_add_2=hardware))
    return rows


def table(found: Sequence[dict]) -> str:
    """Rows of modules, indented by their depth."""
    rows = [("module", "parameters", "FLOPs (multiply-add = 1)", "FLOPs (multiply-add = 2)")]
    for row in found:
        name, *numbers = row.values()
        label = "  " * (name.count(".") + 1) + name.split(".")[-1] if name else "total"
        rows.append((label, *(f"{number:,}" for number in numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join(lines)


def get_flops(args: argparse.Namespace) -> None:
    from mmvssm.analysis import model_cost

    if args.depth < 0:
        raise cli.UserError(f"--depth must be 0 (only the total) or more, got {args.depth}")
    cfg = cli.load_config(config_file(args.model), args.cfg_options)
    task = cli.task_of(cfg)
    shape = args.shape or DEFAULT_SHAPES[task]
    if len(shape) > 2:
        raise cli.UserError(f"--shape takes one number (a square) or two, height and width, got {len(shape)}")
    shape = (cfg.model.backbone.get("in_channels", 3), shape[0], shape[-1])
    model = build_model(cfg)
    papers, hardware = (model_cost(model, shape, convention) for convention in ("papers", "hardware"))
    rows = modules(papers, hardware, args.depth)
    print(table(rows))
    print(f"\ninput           {' x '.join(map(str, shape))} (channels, height, width)")
    print(f"parameters      {papers.parameters:,} ({papers.parameters / 1e6:.3f} M)")
    print(f"multiply-add=1  {papers.flops.total:,} ({papers.flops.total / 1e9:.3f} G, as in published tables)")
    print(f"multiply-add=2  {hardware.flops.total:,} ({hardware.flops.total / 1e9:.3f} G)")
    if args.json is not None:
        totals = dict(parameters=papers.parameters)
        totals |= dict(multiply_add_1=papers.flops.total, multiply_add_2=hardware.flops.total)
        operators = dict(multiply_add_1=papers.flops.by_operator, multiply_add_2=hardware.flops.by_operator)
        content = dict(model=args.model, task=task, shape=shape, **totals, modules=rows, operators=operators)
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def config_file(name: str) -> str:
    """The file itself, or that of a model of the zoo."""
    from mmvssm.apis import zoo

    return name if name.endswith(".py") else str(zoo.config_path(name))


def main(argv: Sequence[str] | None = None) -> int:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="config file, or a name of the model zoo")
    parser.add_argument("--shape", type=int, nargs="+", metavar="N", help="input size: one number, or height and width")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules in the table (2); 0 for the total")
    parser.add_argument("--json", type=Path, help="also write totals, modules and operators to this file")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes, as dotted.key=value")
    args = parser.parse_args(argv)
    return cli.run_tool(lambda: get_flops(args))


if __name__ == "__main__":
    sys.exit(main())
