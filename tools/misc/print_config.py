"""Prints a config with its bases and the command line's changes filled in."""

import argparse
import sys
from collections.abc import Sequence

import mmvssm  # noqa: F401  first, so that its import hooks are in place before anything of mm* is imported
from mmvssm.utils import cli


def main(argv: Sequence[str] | None = None) -> int:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes, as dotted.key=value")
    parser.add_argument("--data-root", help="use this folder wherever the config names its data_root")
    parser.add_argument("--save-path", help="also write it to this .py, .json or .yml file")
    args = parser.parse_args(argv)

    def show() -> None:
        cfg = cli.load_config(args.config, args.cfg_options, args.data_root)
        print(cfg.pretty_text)
        if args.save_path is not None:
            if not args.save_path.endswith((".py", ".json", ".yml")):
                raise cli.UserError(f"--save-path must end in .py, .json or .yml, got {args.save_path}")
            cfg.dump(args.save_path)

    return cli.run_tool(show)


if __name__ == "__main__":
    sys.exit(main())
