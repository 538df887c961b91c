"""Print versions, devices, operator backend and compatibility pieces; ends with status 1 if something cannot work.

python tools/misc/check_env.py            # imports the OpenMMLab libraries, about ten seconds
python tools/misc/check_env.py --quick    # versions and devices only
"""

import argparse
import sys
import warnings

from mmvssm.utils import environment_report, find_problems


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="do not import the OpenMMLab libraries")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with warnings.catch_warnings():
        # Deprecations inside the libraries are not what this report is about; notices of mmvssm are.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="mmvssm")
        print(environment_report(probe=not args.quick))
    return 1 if find_problems() else 0


if __name__ == "__main__":
    sys.exit(main())
