"""Writes a classifier or a backbone's feature maps as an ONNX file, and compares the file with the model.

python tools/export_onnx.py vmamba-tiny-s1l8 tiny.onnx --checkpoint FILE
python tools/export_onnx.py vmamba-tiny-s1l8 maps.onnx --out-indices 0 1 2 3 --dynamic all
"""

import argparse
import sys
from collections.abc import Sequence

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.export import DYNAMIC, export_onnx
from mmvssm.utils import cli


def export(args: argparse.Namespace) -> None:
    if len(args.size) > 2:
        raise cli.UserError(f"--size takes one number (a square) or two, height and width, got {len(args.size)}")
    size = (args.size[0], args.size[-1])
    indices = None if args.out_indices is None else tuple(args.out_indices)
    path = export_onnx(args.model, args.output, size, args.dynamic, args.checkpoint, indices, not args.no_verify)
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    scans = sum(node.op_type == "Scan" for node in graph.node)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {len(graph.node)} nodes, {scans} of them Scan")
    for value in (*graph.input, *graph.output):
        shape = [d.dim_param or d.dim_value or "?" for d in value.type.tensor_type.shape.dim]
        print(f"  {value.name} ({', '.join(map(str, shape))})")
    if not args.no_verify:
        print("  compared with the model in onnxruntime: equal within 1e-4 of the largest value")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name from mmvssm.list_models(), or a short one such as vmamba-tiny-s1l8")
    parser.add_argument("output", help=".onnx file to write")
    parser.add_argument("--checkpoint", help="weights, path or URL, ours or the authors'; random without")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[224], metavar="N", help="height and width, or one number"
    )
    parser.add_argument("--dynamic", choices=DYNAMIC, default="batch", help="what may change when the file is used")
    parser.add_argument("--out-indices", type=int, nargs="+", metavar="I", help="maps of these stages, no classifier")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the file with the model")
    args = parser.parse_args(argv)
    return cli.run_tool(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
