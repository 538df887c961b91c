#!/usr/bin/env bash
# The onedl line (the maintained fork under the same import names) in an environment of its own: imports, registry,
# configs of all three libraries, one training iteration.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

python3 tools/quickstart.py install --venv .venv-onedl --line onedl
.venv-onedl/bin/python .ci/onedl_smoke.py
