#!/usr/bin/env bash
# The tests: `bash tests/run.sh` runs all, `bash tests/run.sh fast` those that start no launcher, for the inner loop.
# More arguments go to pytest: `bash tests/run.sh fast -k order`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup_env.sh"
select=()
if [ "${1:-}" = fast ]; then
  shift
  select=(-m "not launch")
else
  ruff check .
  ruff format --check .
  mypy
fi
exec python -m pytest "${select[@]}" "$@"
