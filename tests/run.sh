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
  # Compiled here, once and without a time limit, rather than inside the first test that trains.
  python -c 'from vidcls.ops import load_op; [load_op(name) for name in ("ShareMemCommBuilder", "FusedAdamBuilder")]' \
    || echo "DeepSpeed's ops cannot be compiled here; the tests go on with torch's fused AdamW"
fi
exec python -m pytest "${select[@]}" "$@"
