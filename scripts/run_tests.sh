#!/usr/bin/env bash
# Lints and tests. Options go to pytest: scripts/run_tests.sh -k linear
set -euo pipefail
EXTRA=dev
. "$(dirname "$(readlink -f "$0")")/env.sh"
cd "$ROOT"
ruff check .
ruff format --check .
lint-imports
exec python -m pytest -q "$@"
